"""Replicas are added by rows owed, and calls survive the loss of a node."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import camserve
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from tests.credentials import hashed
from tests.processes import LIMIT_S, TINY, patient_client
from tests.ray.cluster import Node, cluster
from tests.ray.held_net import FOLDER
from tests.ray.serving import HELD, WHITE, Deployment, deployed, wait_until
from tests.server.service.frontends.test_calls import bearer
from tests.server.service.test_errors import IMAGE, TIMEOUT_S, details, method, request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOKEN, LOW = "secret", "other-secret"
CONFIG = f"""
device = "cpu"
{TINY}{HELD}
[[tokens]]
name = "team"
sha256 = "{hashed(TOKEN)}"

[[tokens]]
name = "low"
sha256 = "{hashed(LOW)}"
priority = "low"
"""
CALLERS = 4


def held(stub: ExplainServiceStub, worker: Node, folder: Path) -> grpc.Future[pb.ExplainResponse]:
    """Return a call that runs on the replica of a node and does not end."""
    (folder / f"hold-{worker.mark}").touch()
    message = request(model="held", image=WHITE, request_id="held")

    def send() -> grpc.Future[pb.ExplainResponse]:
        return stub.Explain.future(message, metadata=bearer(TOKEN), timeout=LIMIT_S)

    call = send()

    def is_held() -> bool:
        nonlocal call
        reached = any(folder.glob(f"held-{worker.mark}-*"))
        if not reached and call.done():
            call.result()  # the other replica has answered
            call = send()
        return reached

    wait_until(is_held)
    return call


def replicas(deployment: Deployment) -> int:
    return sum(line["event"] == "ready" for line in deployment.log())


class Callers:
    """Callers that repeat one request until they are stopped, half of them without the retries of the client."""

    def __init__(self, address: str, expected: np.ndarray) -> None:
        self.address = address
        self.expected = expected
        self.results: list[bool] = []
        self.errors: list[grpc.RpcError | camserve.CamserveError] = []
        self.over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(CALLERS) as pool:
            futures = [pool.submit(self._client if i % 2 else self._raw) for i in range(CALLERS)]
            try:
                yield
            finally:
                self.over.set()
            for each in futures:
                each.result()

    def wait_for_more(self, count: int) -> None:
        """Wait for more results."""
        wanted = len(self.results) + count
        wait_until(lambda: len(self.results) >= wanted)

    def _client(self) -> None:
        with patient_client(self.address, token=TOKEN) as client:
            while not self.over.is_set():
                try:
                    answer = client.explain(IMAGE, model="tiny", method="rise", parameters={"masks": 200})
                except camserve.CamserveError as error:
                    self.errors.append(error)
                else:
                    self.results.append(np.array_equal(answer.saliency, self.expected))

    def _raw(self) -> None:
        message = request(request_id="raw", method=method("rise", masks=200))
        with grpc.insecure_channel(self.address, [("grpc.enable_retries", 0)]) as channel:
            while not self.over.is_set():
                try:
                    answer = ExplainServiceStub(channel).Explain(message, metadata=bearer(TOKEN), timeout=LIMIT_S)
                except grpc.RpcError as error:
                    self.errors.append(error)
                else:
                    values = np.frombuffer(answer.maps[0].saliency.data, "<f4")
                    self.results.append(np.array_equal(values, self.expected.ravel()))


def refused(stub: ExplainServiceStub, metadata: Any, **changes: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Explain(request(request_id="r-1", **changes), metadata=metadata, timeout=TIMEOUT_S)
    assert details(caught.value)["RequestInfo"].request_id
    return caught.value


def test_replicas_follow_rows_owed_and_calls_survive_the_loss_of_a_node(tmp_path: Path) -> None:
    quick = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5"}
    with (
        cluster(head_cpus=1, worker_cpus=1, **quick, **{FOLDER: str(tmp_path)}) as running,
        deployed(running, tmp_path, CONFIG, "--autoscale", "1:2", "--rows-per-replica", "1000") as deployment,
        grpc.insecure_channel(deployment.address) as channel,
    ):
        stub = ExplainServiceStub(channel)
        assert refused(stub, ()).code() is grpc.StatusCode.UNAUTHENTICATED
        assert refused(stub, bearer("unknown")).code() is grpc.StatusCode.UNAUTHENTICATED
        assert refused(stub, bearer(LOW), priority="high").code() is grpc.StatusCode.PERMISSION_DENIED

        # One request. Serve's own autoscaling would count it as one call and keep one replica.
        assert replicas(deployment) == 1
        long = pb.ExplainStreamRequest(request=request(method=method("rise", masks=100_000)))
        stream = stub.ExplainStream(long, metadata=bearer(TOKEN), timeout=LIMIT_S)
        with suppress(StopIteration):
            wait_until(lambda: replicas(deployment) == 2 or next(stream) is None)
        assert replicas(deployment) == 2
        stream.cancel()

        with patient_client(deployment.address, token=TOKEN) as client:
            expected = client.explain(IMAGE, model="tiny", method="rise", parameters={"masks": 200}).saliency
        callers = Callers(deployment.address, expected)
        with callers.running():
            callers.wait_for_more(20)
            call = held(stub, running.worker, tmp_path)
            running.worker.kill()
            lost = call.exception()
            assert isinstance(lost, grpc.RpcError)
            assert lost.code() is grpc.StatusCode.UNAVAILABLE
            assert details(lost)["ErrorInfo"].reason == "REPLICA_LOST"
            assert details(lost)["RequestInfo"].request_id == "held"
            callers.wait_for_more(40)
        print(f"{len(callers.results)} results, errors: {callers.errors}")
        assert all(callers.results)
        for error in callers.errors:
            assert isinstance(error, grpc.RpcError), "the client repeats calls that a lost replica has not answered"
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert details(error)["ErrorInfo"].reason == "REPLICA_LOST"
            assert details(error)["RequestInfo"].request_id == "raw"
        deployment.stop()


def test_command_ends_if_the_head_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # a minute by default
    with (
        cluster(head_cpus=0, worker_cpus=1) as running,
        deployed(running, tmp_path, f'device = "cpu"\n{TINY}') as deployment,
    ):
        running.head.kill()
        _, stderr = deployment.process.communicate(timeout=LIMIT_S)
        assert deployment.process.returncode == 1
        assert "Failed to connect to GCS within 5 seconds" in stderr
        with camserve.Client(deployment.address, timeout=2) as client, pytest.raises(camserve.CamserveError) as caught:
            client.explain(IMAGE, model="tiny", method="cam")
        assert isinstance(caught.value, camserve.Unavailable | camserve.DeadlineExceeded)
