"""A rolling update loses no request: servers are replaced one by one while clients balance between them."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.engines import wait_until
from tests.processes import LIMIT_S, TINY, Served, free_port, patient_client, served

CALLERS = 3
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


class Callers:
    """Threads with a client each, which send one request after the other until they are stopped.

    Args:
        address: A gRPC target with the addresses of all servers.
        stack: Stops the threads at its end.
    """

    def __init__(self, address: str, stack: ExitStack) -> None:
        self.answers: list[bytes] = []
        self.errors: list[BaseException] = []
        self._address = address
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]
        stack.callback(self.stop)
        for thread in self._threads:
            thread.start()

    def _call(self) -> None:
        with patient_client(self._address) as client:
            while not self._stopping.is_set():
                try:
                    self.answers.append(
                        client.explain(IMAGE, method="rise", parameters={"masks": 64}).saliency.tobytes()
                    )
                except BaseException as error:
                    self.errors.append(error)
                    return

    def wait_for_more(self, more: int = 30) -> None:
        wanted = len(self.answers) + more
        wait_until(lambda: len(self.answers) >= wanted or bool(self.errors))

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


def calls(server: Served) -> int:
    return server.stderr().count('"event": "call"')


@pytest.mark.slow
def test_rolling_update_loses_no_request(tmp_path: Path) -> None:
    with ExitStack() as stack:

        def start(name: str, listen: str) -> Served:
            config = tmp_path / f"{name}.toml"
            config.write_text(TINY, encoding="utf-8")
            return stack.enter_context(served(config, "--listen", listen))

        old = [start(f"old-{i}", f"127.0.0.1:{free_port()}") for i in range(2)]
        callers = Callers("ipv4:" + ",".join(server.address for server in old), stack)
        callers.wait_for_more()
        for i, server in enumerate(old):
            before = calls(server)
            wait_until(lambda server=server, before=before: calls(server) > before)  # type: ignore[misc]
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(LIMIT_S) == 0
            callers.wait_for_more()
            new = start(f"new-{i}", server.address)
            wait_until(lambda new=new: calls(new) > 0 or bool(callers.errors))  # type: ignore[misc]
        callers.wait_for_more()
        callers.stop()
    assert callers.errors == []
    assert len({*callers.answers}) == 1, "all servers give the same map"
