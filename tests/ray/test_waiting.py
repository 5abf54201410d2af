"""Calls through Ray Serve that wait: for a replica, for their deadline, and for callers that do not read."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import camserve
from camserve import connection
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_ray.serving import proxy
from tests.credentials import hashed
from tests.processes import LIMIT_S, TINY, patient_client
from tests.ray.cluster import Node, cluster
from tests.ray.held_net import FOLDER
from tests.ray.serving import HELD, WHITE, Deployment, deployed, wait_until
from tests.server.service.frontends.test_calls import bearer
from tests.server.service.test_errors import TIMEOUT_S, details, method, metric, request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOKEN, SMALL = "secret", "other-secret"
MOST_ROWS = 5_000
SIDE = 1_200  # a request with an image of this size has 4.3 MB, and each map 5.8 MB
CONFIG = f"""
device = "cpu"
{TINY}{HELD}
[[models]]
name = "large"
source = "python:tests.nets:tiny_cnn"
input_size = [{SIDE}, {SIDE}]
batch_size = 1

[[tokens]]
name = "team"
sha256 = "{hashed(TOKEN)}"

[[tokens]]
name = "small"
sha256 = "{hashed(SMALL)}"
max_rows_owed = {MOST_ROWS}
"""
LARGE = pb.Image(pixels=pb.Pixels(height=SIDE, width=SIDE, data=bytes(range(240)) * (3 * SIDE * SIDE // 240)))
UNLIMITED = {"max_receive_message_length": -1, "max_send_message_length": -1}
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class OneReplica:
    """A deployment with one replica, on a node that tests can hold."""

    deployment: Deployment
    folder: Path

    @property
    def node(self) -> Node:
        """The node of the replica."""
        return self.deployment.cluster.head

    @contextmanager
    def held(self, name: str = "hold") -> Iterator[None]:
        """Hold the network in the context: see held_net.py."""
        self.is_held()  # forget those that earlier tests have held
        file = self.folder / f"{name}-{self.node.mark}"
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    def is_held(self) -> bool:
        """Return True if a network has waited since the last question."""
        files = [*self.folder.glob(f"held-{self.node.mark}-*")]
        for each in files:
            each.unlink(missing_ok=True)
        return bool(files)

    def channel(self, **options: int) -> grpc.Channel:
        """Return a channel to the proxy, with options of gRPC."""
        return grpc.insecure_channel(
            self.deployment.address, [(f"grpc.{name}", value) for name, value in options.items()]
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneReplica]:
    folder = tmp_path_factory.mktemp("ray")
    with (
        cluster(head_cpus=1, worker_cpus=0, **{FOLDER: str(folder)}) as running,
        deployed(running, folder, CONFIG) as deployment,
    ):
        yield OneReplica(deployment, folder)
        deployment.stop()


@pytest.fixture
def stub(served: OneReplica) -> Iterator[ExplainServiceStub]:
    with served.channel() as channel:
        yield ExplainServiceStub(channel)


def test_calls_without_a_replica_wait_for_one(served: OneReplica, stub: ExplainServiceStub) -> None:
    def send(timeout: float | None) -> grpc.Future[pb.ExplainResponse]:
        return stub.Explain.future(request(request_id="r-1"), metadata=bearer(TOKEN), timeout=timeout)

    expected = stub.Explain(request(), metadata=bearer(TOKEN), timeout=TIMEOUT_S)
    (replica,) = served.deployment.replicas()
    with served.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        with served.held("hold-load"):
            os.kill(replica, signal.SIGKILL)
            wait_until(served.is_held)  # Serve has noticed the loss, and starts another replica
            waiting, cancelled, late = send(None), send(None), send(2)
            error = late.exception()
            assert isinstance(error, grpc.RpcError)
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status == NOT_SERVING
            while next(watch).status != NOT_SERVING:
                pass
            cancelled.cancel()
            assert cancelled.cancelled()
            assert not waiting.done()
        answer = waiting.result(timeout=LIMIT_S)
        assert answer.maps[0].saliency == expected.maps[0].saliency
        while next(watch).status != SERVING:
            pass
        watch.cancel()
    # The replica has got the call that waited, and neither of the others.
    assert [line["code"] for line in served.deployment.calls("r-1")] == ["OK"]


def test_replica_ends_a_call_at_its_deadline(served: OneReplica, stub: ExplainServiceStub) -> None:
    """Serve does not tell replicas the deadline of a call."""
    message = request(model="held", image=WHITE, request_id="late")

    def has_ended() -> bool:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Explain(message, metadata=bearer(TOKEN), timeout=2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return bool(served.deployment.calls("late"))  # a call that has not reached the replica leaves no line

    with served.held():
        wait_until(has_ended)
    assert {line["code"] for line in served.deployment.calls("late")} == {"DEADLINE_EXCEEDED"}
    assert stub.Explain(message, metadata=bearer(TOKEN), timeout=TIMEOUT_S).maps


def test_large_requests_and_responses_pass(served: OneReplica) -> None:
    """The limits of gRPC are 4 MB by default, on each part of the path."""
    message = request(model="large", image=LARGE)
    with served.channel(**UNLIMITED) as channel:
        answer = ExplainServiceStub(channel).Explain(message, metadata=bearer(TOKEN), timeout=TIMEOUT_S)
    assert answer.maps[0].saliency.shape == [SIDE, SIDE]
    assert answer.ByteSize() > 4 << 20
    assert message.ByteSize() > 4 << 20


def test_events_wait_for_a_slow_caller(served: OneReplica) -> None:
    """The call ends before the caller has read an event."""
    randomised = metric("randomisation-hog", steps=2)
    explain = request(model="large", image=LARGE, metrics=[randomised], request_id="slow")
    with served.channel(**UNLIMITED) as channel:
        stub = ExplainServiceStub(channel)
        events = stub.ExplainStream(pb.ExplainStreamRequest(request=explain), metadata=bearer(TOKEN))
        wait_until(lambda: bool(served.deployment.calls("slow")))
        found = [*events]
    assert [line["code"] for line in served.deployment.calls("slow")] == ["OK"]
    kinds = [each.WhichOneof("event") for each in found if each.WhichOneof("event") != "progress"]
    assert kinds == ["randomised", "randomised", "result"]
    assert sum(each.ByteSize() for each in found) > 16 << 20


def test_quota_of_a_caller_applies(served: OneReplica, stub: ExplainServiceStub) -> None:
    masks = {"method": method("rise", masks=MOST_ROWS // 2)}
    with served.held():
        running = stub.Explain.future(request(model="held", image=WHITE, **masks), metadata=bearer(SMALL))
        wait_until(served.is_held)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Explain(request(request_id="r-1", **masks), metadata=bearer(SMALL), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"the caller's limit is {MOST_ROWS} rows" in (caught.value.details() or "")
        assert details(caught.value)["ErrorInfo"].reason == "QUOTA_EXCEEDED"
        other = stub.Explain.future(request(**masks), metadata=bearer(TOKEN), timeout=TIMEOUT_S)
        running.cancel()
    assert other.result().maps, "another caller is accepted"


def test_pings_close_the_connections_of_long_unary_calls_only(
    served: OneReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC closes a connection at the third ping without data between them."""
    monkeypatch.setattr(connection, "KEEPALIVE_MS", int(1_100 * proxy._WATCH_S))  # more than Watch, less than 30 s
    pings = {"keepalive_time_ms": connection.KEEPALIVE_MS, "http2.max_pings_without_data": 0, "enable_retries": 0}
    answers: list[camserve.Explanation] = []

    def explain() -> None:
        with patient_client(served.deployment.address, token=TOKEN) as client:
            pixels = np.full((40, 30, 3), 255, np.uint8)
            answers.append(client.explain(pixels, model="held", method="grad-cam", request_id="client"))

    caller = threading.Thread(target=explain)
    with served.held(), served.channel(**pings) as channel:
        caller.start()
        message = request(model="held", image=WHITE, request_id="unary")
        with pytest.raises(grpc.RpcError) as caught:
            ExplainServiceStub(channel).Explain(message, metadata=bearer(TOKEN))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "Too many pings"
        assert caller.is_alive()
    caller.join(LIMIT_S)
    assert [each.request_id for each in answers] == ["client"]
    (line,) = served.deployment.calls("client")
    assert line["code"] == "OK", "the first attempt was answered"
