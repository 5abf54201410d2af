"""Calls of a server with two front ends give the same answers and errors as those of a server without."""

from __future__ import annotations

import itertools
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server.config import Config, ModelConfig, TokenConfig
from camserve_server.service.listeners import SERVICE
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.credentials import hashed
from tests.fuzz.sample_images import VALID
from tests.server.service.test_errors import CASES, TIMEOUT_S, box, method, metric, request, tensor
from tests.support import stopped

TINY: dict[str, Any] = {"source": "python:tests.nets:tiny_cnn", "input_size": (32, 32), "batch_size": 4}
LIMITS: dict[str, Any] = {
    "device": "cpu",
    "listen": "127.0.0.1:0",
    "metrics_listen": "127.0.0.1:0",
    "health_listen": "127.0.0.1:0",
    "models": [ModelConfig(name="tiny", **TINY), ModelConfig(name="double", precision=("fp64",), **TINY)],
    "max_image_pixels": 1_000_000,
    "max_message_bytes": 4 << 20,
    "max_rows_owed": 5_000,
}
MAP = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
CENTRE = pb.Truth(boxes=[box(0.2, 0.2, 0.7, 0.8)], mask=tensor(np.eye(9, 7)))


@contextmanager
def channels(address: str, count: int) -> Iterator[list[grpc.Channel]]:
    """Yield channels with a connection each, which the kernel distributes over the front ends."""
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    opened = [grpc.insecure_channel(address, own_connection) for _ in range(count)]
    yield opened
    for each in opened:
        each.close()


@pytest.fixture(scope="module")
def front() -> Iterator[Server]:
    with serving(Config(**LIMITS, frontends=2)) as server:
        yield server


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    with serving(Config(**LIMITS)) as server:
        yield server


@pytest.fixture(scope="module")
def stubs(front: Server, plain: Server) -> Iterator[tuple[ExplainServiceStub, ExplainServiceStub]]:
    """Stubs of the server with front ends and of the other one."""
    with grpc.insecure_channel(front.address) as theirs, grpc.insecure_channel(plain.address) as ours:
        yield ExplainServiceStub(theirs), ExplainServiceStub(ours)


EXPLAIN: dict[str, dict[str, Any]] = {
    "pixels": {},
    "a file": {"image": pb.Image(encoded=VALID["jpeg"])},
    "a tensor": {"image": pb.Image(tensor=tensor(np.random.default_rng(1).normal(size=(3, 32, 32))))},
    "several targets": {"target_top_k": 3, "top_k": 2},
    "raw maps": {"raw": True},
    "maps that metrics need": {"metrics": [metric("average-drop"), metric("insertion", steps=7)]},
    "a location": {"metrics": [metric("pixel-f1"), metric("box-accuracy")], "truth": CENTRE},
    "a method with its own scaling": {"method": method("poly-cam", variant="official")},
    "constant maps": {"image": pb.Image(tensor=tensor(np.zeros((3, 32, 32)))), "method": method("input-x-gradient")},
    "warnings of the engine": {"method": method("ablation-cam"), "target_top_k": 7},
    "a nearly constant image": {"image": pb.Image(pixels=pb.Pixels(height=8, width=8, data=bytes(192)))},
    "half precision": {"map_format": pb.MapFormat(dtype="float16")},
    "native resolution": {"map_format": pb.MapFormat(dtype="uint8", native=True), "raw": True},
    "double precision": {"model": "double"},
    "double precision, native": {"model": "double", "map_format": pb.MapFormat(native=True)},
    "a budget": {"method": method("rise", masks=64), "budget": 20},
}
EVALUATE: dict[str, dict[str, Any]] = {
    "a map": {"saliency": tensor(MAP), "target": pb.Target(index=2)},
    "a constant map": {"saliency": tensor(np.ones((4, 4)))},
    "a method": {"method": method("grad-cam")},
    "a location": {"saliency": tensor(MAP), "metrics": [metric("pixel-f1")], "truth": CENTRE},
    "boxes": {"method": method("grad-cam"), "metrics": [metric("box-accuracy")], "truth": pb.Truth(boxes=CENTRE.boxes)},
    "randomised networks": {"method": method("grad-cam"), "metrics": [metric("randomisation-spearman", steps=2)]},
}


def evaluate(**changes: Any) -> pb.EvaluateRequest:
    valid: dict[str, Any] = {"model": "tiny", "image": request().image, "metrics": [metric("average-gain")]}
    return pb.EvaluateRequest(**{**valid, **changes})


def answers(stub: ExplainServiceStub, rpc: str, message: Any) -> list[Message]:
    """Call an RPC and return its messages without progress, and without the times of the cost."""
    match rpc:
        case "Explain" | "Evaluate":
            received = [getattr(stub, rpc)(message, timeout=TIMEOUT_S)]
        case _:
            wrap = getattr(pb, f"{rpc}Request")
            received = [*getattr(stub, rpc)(wrap(request=message), timeout=TIMEOUT_S)]
    kept = [each for each in received if not (rpc.endswith("Stream") and each.HasField("progress"))]
    cost = (kept[-1].result if rpc.endswith("Stream") else kept[-1]).cost
    cost.queue_ms = cost.compute_ms = 0
    assert cost.rows
    return kept


def differing(theirs: Sequence[Message], ours: Sequence[Message]) -> list[str]:
    """Return the names of the fields that differ. Comparisons of whole messages give unreadable reports."""
    if len(theirs) != len(ours):
        return [f"{len(theirs)} messages, {len(ours)} messages"]
    names = []
    for one, other in zip(theirs, ours, strict=True):
        for field in one.DESCRIPTOR.fields:
            left, right = getattr(one, field.name), getattr(other, field.name)
            if left != right:
                inner = differing([left], [right]) if isinstance(left, Message) else []
                names += [f"{field.name}.{each}" for each in inner] or [field.name]
    return names


@pytest.mark.parametrize("name", EXPLAIN)
@pytest.mark.parametrize("rpc", ["Explain", "ExplainStream"])
def test_explanations_are_the_same(stubs: tuple[ExplainServiceStub, ExplainServiceStub], name: str, rpc: str) -> None:
    message = request(**{"request_id": "r-1", **EXPLAIN[name]})
    theirs, ours = (answers(stub, rpc, message) for stub in stubs)
    assert differing(theirs, ours) == []


def test_warnings_of_the_engine_follow_those_of_the_map(stubs: tuple[ExplainServiceStub, Any]) -> None:
    response = stubs[0].Explain(request(**EXPLAIN["warnings of the engine"]), timeout=TIMEOUT_S)
    assert any("expect a positive logit" in each for each in response.maps[0].warnings)


def test_levels_are_the_same(stubs: tuple[ExplainServiceStub, ExplainServiceStub]) -> None:
    message = request(request_id="r-1", method=method("poly-cam"), metrics=[metric("randomisation-hog", steps=2)])
    theirs, ours = (answers(stub, "ExplainStream", message) for stub in stubs)
    assert differing(theirs, ours) == []
    kinds = [each.WhichOneof("event") for each in theirs if isinstance(each, pb.ExplainStreamResponse)]
    assert kinds == ["level"] * 3 + ["randomised"] * 2 + ["result"]


@pytest.mark.parametrize("name", EVALUATE)
@pytest.mark.parametrize("rpc", ["Evaluate", "EvaluateStream"])
def test_evaluations_are_the_same(stubs: tuple[ExplainServiceStub, ExplainServiceStub], name: str, rpc: str) -> None:
    message = evaluate(**{"request_id": "r-1", **EVALUATE[name]})
    theirs, ours = (answers(stub, rpc, message) for stub in stubs)
    assert differing(theirs, ours) == []


def test_lists_are_the_same(stubs: tuple[ExplainServiceStub, ExplainServiceStub]) -> None:
    for rpc, message in (
        ("ListModels", pb.ListModelsRequest()),
        ("ListMethods", pb.ListMethodsRequest(model="tiny")),
        ("ListMetrics", pb.ListMetricsRequest()),
    ):
        theirs, ours = (getattr(stub, rpc)(message, timeout=TIMEOUT_S) for stub in stubs)
        assert theirs == ours


def test_request_without_identifier_gets_one(front: Server, stubs: tuple[ExplainServiceStub, Any]) -> None:
    response = stubs[0].Explain(request(), timeout=TIMEOUT_S)
    assert len(response.request_id) == 32
    assert response.receipt.request_id == response.request_id


def test_progress_is_passed_on(stubs: tuple[ExplainServiceStub, Any]) -> None:
    stream = stubs[0].ExplainStream(
        pb.ExplainStreamRequest(request=request(method=method("rise", masks=64))), timeout=TIMEOUT_S
    )
    progress = [each.progress for each in stream if each.HasField("progress")]
    assert progress[-1].rows_done == progress[-1].rows_total == 65
    assert progress[-1].stage == "explain"


# ---- errors ----------------------------------------------------------------------------------------------------------


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Call a function and return the code, the message and the trailing metadata of the refused call."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **kwargs)
    error: Any = caught.value
    return error.code(), error.details(), sorted((each.key, each.value) for each in error.trailing_metadata())


def without_fresh_identifiers(refused: tuple[Any, ...]) -> list[str]:
    """Remove new identifiers. A message that exceeds the limits gets one, because it is not parsed."""
    return [re.sub(r"[0-9a-f]{32}", "", repr(each)) for each in refused]


@pytest.mark.parametrize("name", [name for name in CASES if "model" not in CASES[name][0]])
@pytest.mark.parametrize("rpc", ["Explain", "ExplainStream"])
def test_wrong_fields_give_the_same_error(
    stubs: tuple[ExplainServiceStub, ExplainServiceStub], name: str, rpc: str
) -> None:
    message = request(**{"request_id": "r-1", **CASES[name][0]})
    theirs, ours = (refusal(answers, stub, rpc, message) for stub in stubs)
    assert theirs == ours


OTHER_ERRORS: dict[str, tuple[str, Any, str]] = {
    "an unknown model": ("Explain", request(request_id="r-1", model="none"), "NOT_FOUND"),
    "a map out of range": ("Evaluate", evaluate(request_id="r-1", saliency=tensor(2 + MAP)), "INVALID_ARGUMENT"),
    "no subject": ("EvaluateStream", evaluate(request_id="r-1"), "INVALID_ARGUMENT"),
    "too many small fields": ("Explain", request(request_id="r-1", priority="a" * 70_000), "RESOURCE_EXHAUSTED"),
    "a budget that is too small": ("Explain", request(request_id="r-1", budget=1), "INVALID_ARGUMENT"),
    "a message that is too large": (
        "Explain",
        request(request_id="r-1", image=pb.Image(encoded=bytes(5 << 20))),
        "RESOURCE_EXHAUSTED",
    ),
}


@pytest.mark.parametrize("name", OTHER_ERRORS)
def test_other_errors_are_the_same(stubs: tuple[ExplainServiceStub, ExplainServiceStub], name: str) -> None:
    rpc, message, code = OTHER_ERRORS[name]
    theirs, ours = (without_fresh_identifiers(refusal(answers, stub, rpc, message)) for stub in stubs)
    assert theirs == ours
    assert code in theirs[0]


def test_messages_that_cannot_be_parsed_are_refused(front: Server) -> None:
    with grpc.insecure_channel(front.address) as channel:
        send: Any = channel.unary_unary("/camserve.v1.ExplainService/Explain")
        code, text, _ = refusal(send, b"\xff" * 99, timeout=TIMEOUT_S)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot be read" in text


def test_full_queue_refuses_before_decoding(front: Server, stubs: tuple[ExplainServiceStub, Any]) -> None:
    long = request(method=method("rise", masks=4_500), image=pb.Image(encoded=VALID["png"]))
    unreadable = request(method=method("rise", masks=4_500), image=pb.Image(encoded=b"no image"))
    before = sample(front, 'code="CANCELLED"')
    with stopped(front.engine):
        running = stubs[0].Explain.future(long, timeout=TIMEOUT_S)
        wait_until(lambda: front.engine.rows_owed() > 4_500)
        code, _, metadata = refusal(stubs[0].Explain, unreadable, timeout=TIMEOUT_S)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(metadata)["grpc-retry-pushback-ms"]) > 0
        running.cancel()
    wait_until(lambda: not front.engine.rows_owed())
    wait_until(lambda: sample(front, 'code="CANCELLED"') > before)  # later tests count cancelled calls


def test_expired_deadline_is_reported_and_costs_no_rows(
    front: Server, stubs: tuple[ExplainServiceStub, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a cancellation at the deadline counts as expired.
    monkeypatch.setattr("camserve_server.service.call.EXPIRED_SHARE", 1.0)
    rows, timeout_s = front.engine.counters.rows, 1
    with stopped(front.engine):
        # A call whose deadline passes before it reaches the server is not counted.
        while not sample(front, 'code="DEADLINE_EXCEEDED"'):
            code, _, _ = refusal(stubs[0].Explain, request(), timeout=timeout_s)
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            wait_until(lambda: not sample(front, "", "camserve_requests_in_flight"))
            timeout_s *= 2
    wait_until(lambda: not front.engine.rows_owed())
    assert front.engine.counters.rows == rows


# ---- cancellation, metrics, health -----------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in itertools.takewhile(lambda _: not condition(), range(int(TIMEOUT_S / 0.01))):
        pause.wait(0.01)
    assert condition()


def sample(server: Server, labels: str, name: str = "camserve_requests_total") -> float:
    """Return the sum of a metric over the samples whose labels contain a text."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=TIMEOUT_S) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and labels in line)


@pytest.mark.parametrize("rpc", ["Explain", "ExplainStream"])
def test_cancellation_reaches_the_engine(front: Server, stubs: tuple[ExplainServiceStub, Any], rpc: str) -> None:
    endless = request(method=method("rise", masks=100_000))
    before = sample(front, 'code="CANCELLED"')
    if rpc == "Explain":
        running: Any = stubs[0].Explain.future(endless, timeout=TIMEOUT_S)
    else:
        running = stubs[0].ExplainStream(pb.ExplainStreamRequest(request=endless), timeout=TIMEOUT_S)
    wait_until(lambda: front.engine.rows_owed() > 0)
    running.cancel()
    wait_until(lambda: not front.engine.rows_owed())
    wait_until(lambda: sample(front, 'code="CANCELLED"') == before + 1)
    assert stubs[0].Explain(request(), timeout=TIMEOUT_S).maps


def test_one_page_has_the_calls_of_all_front_ends(front: Server) -> None:
    before = sample(front, 'rpc="Explain"')
    with channels(front.address, 8) as opened:
        for channel in opened:
            assert ExplainServiceStub(channel).Explain(request(), timeout=TIMEOUT_S).maps
    assert sample(front, 'rpc="Explain"') == before + 8
    assert sample(front, "", "camserve_requests_in_flight") == 0


def test_health_and_reflection(front: Server) -> None:
    with grpc.insecure_channel(front.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", SERVICE):
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (found,) = reflect(iter([question]), timeout=TIMEOUT_S)
        assert SERVICE in {each.name for each in found.list_services_response.service}


# ---- callers ---------------------------------------------------------------------------------------------------------


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


@pytest.mark.slow  # starts a server with front ends
def test_tokens_quotas_and_priorities_apply_across_front_ends() -> None:
    tokens = [
        TokenConfig(name="anna", sha256=hashed("a"), max_rows_owed=5_000),
        TokenConfig(name="late", sha256=hashed("b"), priority="low"),
    ]
    with (
        serving(Config(**LIMITS | {"max_rows_owed": 100_000}, tokens=tokens, frontends=2)) as server,
        channels(server.address, 8) as opened,
    ):
        first, *others = [ExplainServiceStub(channel) for channel in opened]
        before = sample(server, 'code="UNAUTHENTICATED"')
        for stub in others:
            code, _, metadata = refusal(stub.Explain, request(), timeout=TIMEOUT_S)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert dict(metadata)["grpc-status-details-bin"]
        assert sample(server, 'code="UNAUTHENTICATED"') == before + len(others)
        code, text, _ = refusal(first.Explain, request(priority="high"), metadata=bearer("b"), timeout=TIMEOUT_S)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "the token of late" in text
        with stopped(server.engine):
            long = request(method=method("rise", masks=4_500))
            running = first.Explain.future(long, metadata=bearer("a"), timeout=TIMEOUT_S)
            wait_until(lambda: server.engine.rows_owed() > 0)
            for stub in others:
                code, text, _ = refusal(stub.Explain, long, metadata=bearer("a"), timeout=TIMEOUT_S)
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "the caller's limit is 5000 rows" in text
            running.cancel()
