"""A load on a camserve server for those who live in locust: `locust -f examples/locustfile.py --host 127.0.0.1:50051`.

Nine Grad-CAMs for each Opti-CAM, of one image. Needs `pip install 'camserve[load]'`.
"""

from __future__ import annotations

import time

import grpc.experimental.gevent
from locust import User, between, task

import camserve
from camserve_cli.load.mix import photograph

# Or else a call would stop all users, not only the one who waits for it.
grpc.experimental.gevent.init_gevent()

IMAGE = photograph()  # or Path("dog.jpg").read_bytes()


class Caller(User):
    """Asks, waits for the answer, looks at it for a second, asks again: a closed loop for each user."""

    host = "127.0.0.1:50051"
    wait_time = between(0.5, 1.5)

    def on_start(self) -> None:
        """A connection for each user."""
        self.client = camserve.Client(self.host or "")

    def on_stop(self) -> None:
        """What is on its way is cancelled."""
        self.client.close()

    @task(9)
    def grad_cam(self) -> None:
        """One row."""
        self.explain("grad-cam")

    @task(1)
    def opti_cam(self) -> None:
        """Ten steps."""
        self.explain("opti-cam", steps=10)

    def explain(self, method: str, **parameters: object) -> None:
        """Tell locust how long it took, and what went wrong."""
        start = time.perf_counter()
        length, failed = 0, None
        try:
            length = self.client.explain(IMAGE, method=method, parameters=parameters).saliency.nbytes
        except camserve.CamserveError as error:
            failed = error
        self.environment.events.request.fire(
            request_type="Explain",
            name=method,
            response_time=1e3 * (time.perf_counter() - start),
            response_length=length,
            exception=failed,
            context=self.context(),
        )
