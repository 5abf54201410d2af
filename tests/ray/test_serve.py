"""Calls through Ray Serve give the same answers and errors as those of a plain server."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import text_format
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import camserve
from camserve.v1 import admin_pb2, admin_pb2_grpc
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server.config import Config
from camserve_server.service.call import ADMITTED
from camserve_server.service.listeners import SERVICE
from camserve_server.service.load_reports import reports
from camserve_server.service.load_reports.orca_pb2 import LoadReport, LoadReportRequest
from tests.conftest import serving
from tests.processes import CAMSERVE, LIMIT_S, environment, patient_client
from tests.ray.cluster import cluster
from tests.ray.serving import Deployment, deployed, wait_until
from tests.server.service.frontends.test_calls import (
    EVALUATE,
    EXPLAIN,
    LIMITS,
    OTHER_ERRORS,
    answers,
    differing,
    evaluate,
    refusal,
    without_fresh_identifiers,
)
from tests.server.service.test_errors import CASES, IMAGE, TIMEOUT_S, details, method, metric, request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test also starts the cluster

CONFIG = f"""
device = "cpu"
max_image_pixels = {LIMITS["max_image_pixels"]}
max_message_bytes = {LIMITS["max_message_bytes"]}
max_rows_owed = {LIMITS["max_rows_owed"]}

[[models]]
name = "tiny"
source = "python:tests.nets:tiny_cnn"
input_size = [32, 32]
batch_size = 4

[[models]]
name = "double"
source = "python:tests.nets:tiny_cnn"
input_size = [32, 32]
batch_size = 4
precision = ["fp64"]
"""
# A request that takes minutes on any machine.
ENDLESS: dict[str, Any] = {"method": method("rise", masks=4_900), "metrics": [metric("sensitivity-max", samples=1000)]}
Stubs = tuple[ExplainServiceStub, ExplainServiceStub]


@pytest.fixture(scope="module")
def ray_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A deployment with one replica on each of two nodes."""
    with (
        cluster(head_cpus=1, worker_cpus=1) as running,
        deployed(running, tmp_path_factory.mktemp("ray"), CONFIG, "--replicas", "2") as deployment,
    ):
        yield deployment
        deployment.stop()


@pytest.fixture(scope="module")
def stubs(ray_serve: Deployment) -> Iterator[Stubs]:
    """Stubs of Ray Serve and of a plain server."""
    plain = {**LIMITS, "metrics_listen": None, "health_listen": None}
    with (
        serving(Config(**plain)) as server,
        grpc.insecure_channel(ray_serve.address) as theirs,
        grpc.insecure_channel(server.address) as ours,
    ):
        yield ExplainServiceStub(theirs), ExplainServiceStub(ours)


@pytest.mark.parametrize("rpc", ["Explain", "ExplainStream"])
def test_explanations_are_the_same(stubs: Stubs, rpc: str) -> None:
    for name, changes in EXPLAIN.items():
        message = request(**{"request_id": "r-1", **changes})
        theirs, ours = (answers(stub, rpc, message) for stub in stubs)
        assert differing(theirs, ours) == [], name


def test_events_of_a_stream_are_the_same(stubs: Stubs) -> None:
    message = request(request_id="r-1", method=method("poly-cam"), metrics=[metric("randomisation-hog", steps=2)])
    theirs, ours = (answers(stub, "ExplainStream", message) for stub in stubs)
    assert differing(theirs, ours) == []
    kinds = [each.WhichOneof("event") for each in theirs if isinstance(each, pb.ExplainStreamResponse)]
    assert kinds == ["level"] * 3 + ["randomised"] * 2 + ["result"]


@pytest.mark.parametrize("rpc", ["Evaluate", "EvaluateStream"])
def test_evaluations_are_the_same(stubs: Stubs, rpc: str) -> None:
    for name, changes in EVALUATE.items():
        message = evaluate(**{"request_id": "r-1", **changes})
        theirs, ours = (answers(stub, rpc, message) for stub in stubs)
        assert differing(theirs, ours) == [], name


def test_lists_are_the_same(stubs: Stubs) -> None:
    for rpc, message in (
        ("ListModels", pb.ListModelsRequest()),
        ("ListMethods", pb.ListMethodsRequest(model="tiny")),
        ("ListMetrics", pb.ListMetricsRequest()),
    ):
        theirs, ours = (getattr(stub, rpc)(message, timeout=TIMEOUT_S) for stub in stubs)
        assert theirs == ours


def comparable(refused: tuple[Any, ...]) -> list[str]:
    """Return a refusal without new identifiers, and with a fixed order of the keys in its details.

    Protobuf encodes the keys of maps in a different order in each process.
    """
    code, message, metadata = refused
    unpacked = {}
    for key, value in metadata:
        unpacked[key] = value
        if key == "grpc-status-details-bin":
            unpacked[key] = [text_format.MessageToString(each) for each in status_pb2.Status.FromString(value).details]
    return without_fresh_identifiers((code, message, unpacked))


@pytest.mark.parametrize("rpc", ["Explain", "ExplainStream"])
def test_errors_about_fields_are_the_same(stubs: Stubs, rpc: str) -> None:
    for name, (changes, *_) in CASES.items():
        if "model" not in changes:
            message = request(**{"request_id": "r-1", **changes})
            theirs, ours = (comparable(refusal(answers, stub, rpc, message)) for stub in stubs)
            assert theirs == ours, name


def test_other_errors_are_the_same(stubs: Stubs) -> None:
    for name, (rpc, message, code) in OTHER_ERRORS.items():
        theirs, ours = (comparable(refusal(answers, stub, rpc, message)) for stub in stubs)
        assert theirs == ours, name
        assert code in theirs[0], name


def test_both_replicas_get_calls(ray_serve: Deployment) -> None:
    """The default router of Serve would use only the replica on the node of the proxy."""
    with patient_client(ray_serve.address) as client:
        for _ in range(12):
            client.explain(IMAGE, model="tiny", method="grad-cam", request_id="spread")
    wait_until(lambda: len(ray_serve.calls("spread")) == 12)
    files = [path for path in ray_serve.cluster.logs.glob("worker-*.err") if '"spread"' in path.read_text()]
    assert len(files) == 2


# ---- limits, deadlines, cancellation ---------------------------------------------------------------------------------


def test_full_queue_is_refused_with_a_retry_delay(stubs: Stubs) -> None:
    long = pb.ExplainStreamRequest(request=request(method=method("rise", masks=4_900)))
    running = [stubs[0].ExplainStream(long, timeout=TIMEOUT_S) for _ in range(12)]  # each replica accepts one

    def refused(call: Any) -> grpc.RpcError | None:
        try:
            for _ in call:
                if not pause.is_set():
                    pause.wait(0.01)
        except grpc.RpcError as error:
            return error
        return None

    pause = threading.Event()
    with ThreadPoolExecutor(12) as pool:
        errors = [error for error in pool.map(refused, running) if error is not None]
    assert errors
    for error in errors:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(error)["ErrorInfo"].reason == "QUEUE_FULL"
        assert details(error)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0


def test_deadline_reaches_the_admission_of_the_replica(stubs: Stubs) -> None:
    """Serve does not tell replicas the deadline of a call."""
    for _ in range(12):  # so that both replicas know their rate; a rate is forgotten after two minutes
        stubs[0].Explain(request(), timeout=TIMEOUT_S)
    endless = request(request_id="late", **ENDLESS)
    with pytest.raises(grpc.RpcError) as caught:
        stubs[0].Explain(endless, timeout=60)  # for millions of rows
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details(caught.value)["ErrorInfo"].reason == "DEADLINE_UNREACHABLE"
    assert details(caught.value)["RequestInfo"].request_id == "late"


@pytest.mark.parametrize("rpc", ["Explain", "ExplainStream"])
def test_cancellation_reaches_the_replica(ray_serve: Deployment, stubs: Stubs, rpc: str) -> None:
    endless = request(request_id=f"cancelled {rpc}", **ENDLESS)

    def cancel_one() -> bool:
        if rpc == "Explain":
            running: Any = stubs[0].Explain.future(endless)  # without a deadline, which would be too early
            threading.Event().wait(0.3)  # a call that has not reached a replica leaves no line in its log
        else:
            running = stubs[0].ExplainStream(pb.ExplainStreamRequest(request=endless))
            next(running)
        running.cancel()
        return any(line["code"] == "CANCELLED" for line in ray_serve.calls(endless.request_id))

    wait_until(cancel_one)
    assert all(line["code"] == "CANCELLED" for line in ray_serve.calls(endless.request_id))
    assert stubs[0].Explain(request(), timeout=TIMEOUT_S).maps


# ---- health and callers ----------------------------------------------------------------------------------------------


def test_health_and_reflection(ray_serve: Deployment) -> None:
    with grpc.insecure_channel(ray_serve.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            asked = health_pb2.HealthCheckRequest(service=service)
            assert health.Check(asked, timeout=TIMEOUT_S).status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(asked, timeout=TIMEOUT_S)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
        code, *_ = refusal(health.Check, health_pb2.HealthCheckRequest(service="other"), timeout=TIMEOUT_S)
        assert code is grpc.StatusCode.NOT_FOUND
        reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (found,) = reflect(iter([question]), timeout=TIMEOUT_S)
        assert SERVICE in {each.name for each in found.list_services_response.service}


def test_proxy_reports_a_constant_load(ray_serve: Deployment) -> None:
    """Without reports, gRPC writes a line to stderr for each connection of a client."""
    with grpc.insecure_channel(ray_serve.address) as channel:
        read: Any = channel.unary_stream(
            f"/{reports.SERVICE}/StreamCoreMetrics", LoadReportRequest.SerializeToString, LoadReport.FromString
        )
        stream = read(LoadReportRequest(), timeout=TIMEOUT_S)
        assert next(stream).application_utilization == reports.utilization(0)
        stream.cancel()


def test_unmodified_client_with_its_health_checks(ray_serve: Deployment) -> None:
    with patient_client(ray_serve.address) as client:
        explanation = client.explain(IMAGE, model="tiny", method="poly-cam", request_id="mine")
        *_, streamed = client.explain_stream(IMAGE, model="tiny", method="poly-cam")
        many = list(client.explain_many([IMAGE] * 6, model="tiny", method="poly-cam"))
        with pytest.raises(camserve.NotFound, match="there is no method 'crystal-ball'"):
            client.explain(IMAGE, model="tiny", method="crystal-ball")
    assert explanation.request_id == "mine"
    assert isinstance(streamed, camserve.Explanation)
    assert np.array_equal(streamed.saliency, explanation.saliency)
    for each in many:
        assert isinstance(each.outcome, camserve.Explanation)
        assert np.array_equal(each.outcome.saliency, explanation.saliency)


def test_second_deployment_is_refused(ray_serve: Deployment) -> None:
    """It would replace the first one, and end it. The command finds a cluster on the loopback address by itself."""
    command = [*CAMSERVE, "ray", "serve", "--address", ray_serve.cluster.address, "--listen", ray_serve.address]
    user = {key: value for key, value in environment().items() if key != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=user, check=False)
    assert ran.returncode == 2, ran.stderr
    assert "the application 'camserve' already runs on this cluster" in ran.stderr
    with patient_client(ray_serve.address) as client:
        assert client.explain(IMAGE, model="tiny", method="grad-cam").target is not None


def test_what_serve_cannot_do(stubs: Stubs, ray_serve: Deployment) -> None:
    """docs/ray.md describes these differences."""
    theirs, ours = (stub.Explain.with_call(request(request_id="r-1"), timeout=TIMEOUT_S)[1] for stub in stubs)
    assert ADMITTED in dict(ours.initial_metadata())
    assert ADMITTED not in dict(theirs.initial_metadata())
    with grpc.insecure_channel(ray_serve.address) as channel:
        unload: Any = admin_pb2_grpc.AdminServiceStub(channel).UnloadModel
        code, *_ = refusal(unload, admin_pb2.UnloadModelRequest(model="tiny"), timeout=TIMEOUT_S)
    assert code is grpc.StatusCode.UNIMPLEMENTED
