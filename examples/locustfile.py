"""Load test of a camserve server with locust: `locust -f examples/locustfile.py --host 127.0.0.1:50051`.

The users send nine Grad-CAM requests for each Opti-CAM request, with one image. The test needs
`pip install 'camserve[load]'`.
"""

from __future__ import annotations

import time

import grpc.experimental.gevent
from locust import User, between, task

import camserve
from camserve_cli.load.mix import photograph

# Without this call, a request would block all users instead of one.
grpc.experimental.gevent.init_gevent()

IMAGE = photograph()  # or Path("dog.jpg").read_bytes()


class Caller(User):
    """User in a closed loop: it sends a request, waits for the answer, and pauses for about a second."""

    host = "127.0.0.1:50051"
    wait_time = between(0.5, 1.5)

    def on_start(self) -> None:
        """Connect. Each user has its own connection."""
        self.client = camserve.Client(self.host or "")

    def on_stop(self) -> None:
        """Close the connection, which cancels a pending request."""
        self.client.close()

    @task(9)
    def grad_cam(self) -> None:
        """Send a request for one row."""
        self.explain("grad-cam")

    @task(1)
    def opti_cam(self) -> None:
        """Send a request for ten steps of optimisation."""
        self.explain("opti-cam", steps=10)

    def explain(self, method: str, **parameters: object) -> None:
        """Send a request, and report its duration and its error to locust."""
        start = time.perf_counter()
        length, exception = 0, None
        try:
            length = self.client.explain(IMAGE, method=method, parameters=parameters).saliency.nbytes
        except camserve.CamserveError as error:
            exception = error
        self.environment.events.request.fire(
            request_type="Explain",
            name=method,
            response_time=1e3 * (time.perf_counter() - start),
            response_length=length,
            exception=exception,
            context=self.context(),
        )
