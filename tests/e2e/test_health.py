"""The health service: its answers while the server is ready, busy, draining and ending."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
import skimage.data
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

import camserve
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server.config import Config, ModelConfig
from camserve_server.engine.engine import Engine
from camserve_server.service.listeners import SERVICE
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.gated import GATE
from tests.processes import LIMIT_S, TINY, patient_client, served

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
IMAGE = skimage.data.chelsea()
MODEL = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)


def check_request(service: str = SERVICE) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def opti_cam(steps: int) -> pb.ExplainRequest:
    height, width, _ = IMAGE.shape
    image = pb.Image(pixels=pb.Pixels(height=height, width=width, data=IMAGE.tobytes()))
    request = pb.ExplainRequest(image=image, method=pb.MethodSpec(name="opti-cam"))
    request.method.parameters.update({"steps": steps})
    return request


def running_stream(stub: ExplainServiceStub, steps: int) -> Iterator[pb.ExplainStreamResponse]:
    """Start a long request and return its stream once some of its rows are done."""
    stream = stub.ExplainStream(pb.ExplainStreamRequest(request=opti_cam(steps)))
    next(event for event in stream if event.progress.rows_done)
    return stream


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "camserve.toml"
    gated = TINY.replace("nets:tiny_cnn", "gated:Gated")
    path.write_text('listen = "127.0.0.1:0"\nhealth_listen = "127.0.0.1:0"\ndevice = "cpu"\ngrace_s = 600\n' + gated)
    return path


@pytest.fixture
def gate(config: Path) -> Path:
    """The file that holds the batches of the server while it exists."""
    return config.parent / "gate"


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_health_listener_serves_only_health() -> None:
    config = Config(listen="127.0.0.1:0", health_listen="127.0.0.1:0", models=[MODEL])
    with serving(config) as server, grpc.insecure_channel(server.health_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(check_request()).status == SERVING
        assert health.Check(check_request("")).status == SERVING
        with pytest.raises(grpc.RpcError) as unknown:
            health.Check(check_request("camserve.v1.NoService"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as other:
            ExplainServiceStub(channel).ListModels(pb.ListModelsRequest())
        assert other.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.slow
def test_cancelled_watch_does_not_end_other_watches() -> None:
    with serving(Config(listen="127.0.0.1:0", models=[MODEL])) as server:
        channel = grpc.insecure_channel(server.address)
        health = health_pb2_grpc.HealthStub(channel)
        cancelled, stays, unknown = (health.Watch(check_request(name)) for name in (SERVICE, SERVICE, "no.Service"))
        assert [next(each).status for each in (cancelled, stays, unknown)] == [SERVING, SERVING, UNKNOWN]
        cancelled.cancel()
        cancelled.code()  # waits for the end of the call
        health.Check(check_request())
        statuses: list[int] = []

        def listen() -> None:
            with suppress(grpc.RpcError):  # the server stops
                statuses.extend(each.status for each in stays)

        listening = threading.Thread(target=listen)
        listening.start()
    listening.join(LIMIT_S)
    channel.close()
    assert statuses == [NOT_SERVING], "the server reports that it stops before it stops"


@pytest.mark.parametrize("on", [True, False])
def test_reflection_can_be_turned_off(on: bool) -> None:
    with (
        serving(Config(listen="127.0.0.1:0", models=[MODEL], reflection=on)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        if on:
            [answer] = reflect(iter([question]))
            assert SERVICE in {service.name for service in answer.list_services_response.service}
        else:
            with pytest.raises(grpc.RpcError) as refused:
                list(reflect(iter([question])))
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ---- while the device is saturated -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_health_answers_while_the_device_is_saturated(server: Server) -> None:
    """Poly-CAM of the embedded model takes thousands of rows, so that the device is never idle meanwhile.

    The test counts the batches that the device completes during each check. This does not depend on the speed of the
    machine: a check that waits for the device takes at least as long as a batch.
    """
    assert server.engine is not None
    with patient_client(server.address) as client, ExitStack() as stack:
        for _ in range(4):
            stream = client.explain_stream(IMAGE, method="poly-cam")
            stack.callback(stream.close)
            next(event for event in stream if isinstance(event, camserve.Progress))
        for address in (server.address, server.health_address):
            batches = batches_during_health_checks(address, server.engine)
            assert np.mean(batches) < 0.5, "a check takes as long as a batch"
            assert np.percentile(batches, 99) <= 2
        assert server.engine.rows_owed() > 1000, "the device was busy during all checks"


def batches_during_health_checks(address: str, engine: Engine, checks: int = 200) -> list[int]:
    """Return for each check how many batches the device completed before the answer arrived."""
    batches = []
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        health.Check(check_request())  # opens the connection
        for _ in range(checks):
            before = engine.counters.batches
            assert health.Check(check_request()).status == SERVING
            batches.append(engine.counters.batches - before)
    print(f"batches during {checks} health checks: mean {np.mean(batches):.2f}, at most {max(batches)}")
    return batches


# ---- at the end ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_draining_server_refuses_new_requests_and_finishes_running_ones(config: Path, gate: Path) -> None:
    with (
        served(config, **{GATE: str(gate)}) as server,
        grpc.insecure_channel(server.address) as channel,
        grpc.insecure_channel(server.health_address) as probes,
    ):
        stub = ExplainServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(check_request())
        assert next(watch).status == SERVING
        gate.touch()
        stream = stub.ExplainStream(pb.ExplainStreamRequest(request=opti_cam(steps=20)))
        stream.initial_metadata()  # the server has admitted the request
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        assert health_pb2_grpc.HealthStub(probes).Check(check_request()).status == NOT_SERVING
        assert health_pb2_grpc.HealthStub(probes).Check(check_request("")).status == SERVING, "the process is alive"
        # A new request is refused on the existing connection and on a new one.
        other = grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        with closing(other):
            for late in (stub, ExplainServiceStub(other)):
                with pytest.raises(grpc.RpcError) as refused:
                    late.Explain(opti_cam(steps=1))
                assert_unavailable(refused.value)
        gate.unlink()
        *_, last = stream
        assert last.result.maps, "the running request is answered"
        assert server.process.wait(LIMIT_S) == 0, "the open Watch call does not delay the end by the grace period"


@pytest.mark.slow
def test_request_that_exceeds_the_grace_period_fails(config: Path, gate: Path) -> None:
    with (
        served(config, CAMSERVE_GRACE_S="0.2", **{GATE: str(gate)}) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stream = running_stream(ExplainServiceStub(channel), steps=10_000)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as failed:
            list(stream)
        assert_unavailable(failed.value)
        assert server.process.wait(LIMIT_S) == 0


def assert_unavailable(error: grpc.RpcError) -> None:
    """Require UNAVAILABLE with a reason and a retry delay, in the details and in the trailing metadata."""
    assert isinstance(error, grpc.Call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    pushback = dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
    assert pushback == "1000"
    status = rpc_status.from_call(error)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.reason, info.domain, retry.retry_delay.seconds) == ("UNAVAILABLE", "camserve", 1)
