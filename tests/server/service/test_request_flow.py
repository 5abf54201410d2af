"""The steps of a request on a real server: parse once, reserve rows, decode, run, respond."""

from __future__ import annotations

import queue
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server import registry, request_plan, request_result
from camserve_server.config import Config, ModelConfig
from camserve_server.engine.admission import Admission
from camserve_server.service import requests, responses, security
from camserve_server.service.server import Server
from tests.conftest import serving

TIMEOUT_S = 120.0  # of waits for events that always come
IMAGE = pb.Image(pixels=pb.Pixels(height=8, width=8, data=np.arange(192, dtype=np.uint8).tobytes()))
CONFIG = Config(
    listen="127.0.0.1:0",
    metrics_listen="127.0.0.1:0",
    device="cpu",
    models=[ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)],
    max_rows_owed=3,  # the engine admits one request of two rows at a time, and any request while it is idle
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(CONFIG) as running:
        yield running


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[ExplainServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield ExplainServiceStub(channel)


def explain_request(method: str = "grad-cam", image: pb.Image = IMAGE, **parameters: str | float) -> pb.ExplainRequest:
    spec = pb.MethodSpec(name=method)
    spec.parameters.update(parameters)
    return pb.ExplainRequest(image=image, method=spec)


def evaluate_request(method: str = "grad-cam", **metrics: dict[str, float]) -> pb.EvaluateRequest:
    request = pb.EvaluateRequest(image=IMAGE, method=pb.MethodSpec(name=method))
    for name, parameters in (metrics or {"average-drop": {}}).items():
        request.metrics.add(name=name.replace("_", "-")).parameters.update(parameters)
    return request


def call(stub: ExplainServiceStub, rpc: str, explain: pb.ExplainRequest, evaluate: pb.EvaluateRequest) -> list[Any]:
    """Call an RPC with the request of its kind; return all messages of its response."""
    match rpc:
        case "Explain":
            return [stub.Explain(explain, timeout=TIMEOUT_S)]
        case "ExplainStream":
            return [*stub.ExplainStream(pb.ExplainStreamRequest(request=explain), timeout=TIMEOUT_S)]
        case "Evaluate":
            return [stub.Evaluate(evaluate, timeout=TIMEOUT_S)]
        case _:
            return [*stub.EvaluateStream(pb.EvaluateStreamRequest(request=evaluate), timeout=TIMEOUT_S)]


class Calls:
    """Counts the calls of functions that it replaces by wrappers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[str, int] = {}
        self._monkeypatch = monkeypatch

    def count(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)
        key = f"{getattr(owner, '__name__', owner).rpartition('.')[2]}.{name}"
        self.counts[key] = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[key] += 1
            return original(*args, **kwargs)

        self._monkeypatch.setattr(owner, name, counted)


class BlockedDecoding:
    """Holds every decoding until `resume`, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.count = 0
        self._resume = threading.Event()
        original = requests.decode_pixels

        def blocked(*args: Any) -> requests.Pixels:
            self.count += 1
            self.begun.set()
            assert self._resume.wait(TIMEOUT_S)
            return original(*args)

        monkeypatch.setattr(requests, "decode_pixels", blocked)

    def resume(self) -> None:
        self._resume.set()


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockedDecoding]:
    blocked = BlockedDecoding(monkeypatch)
    yield blocked
    blocked.resume()


@pytest.mark.parametrize("rpc", ["Explain", "ExplainStream", "Evaluate", "EvaluateStream"])
def test_each_step_of_a_request_runs_once(stub: ExplainServiceStub, monkeypatch: pytest.MonkeyPatch, rpc: str) -> None:
    calls = Calls(monkeypatch)
    for owner, name in [
        (registry, "get_method"),
        (registry.Method, "check"),
        (requests, "rows_needed"),
        (requests, "decode_pixels"),
        (security, "rights"),
        (Admission, "admit"),
    ]:
        calls.count(owner, name)
    explain, evaluate = explain_request(), evaluate_request()
    explain.metrics.add(name="average-drop")
    call(stub, rpc, explain, evaluate)
    assert calls.counts == dict.fromkeys(calls.counts, 1)


def test_only_the_admitted_caller_decodes_its_image(
    server: Server, stub: ExplainServiceStub, decoding: BlockedDecoding
) -> None:
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(6):
        stub.Explain.future(explain_request(), timeout=TIMEOUT_S).add_done_callback(ended.put)
    refused = [ended.get(timeout=TIMEOUT_S) for _ in range(5)]
    assert {each.code() for each in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert decoding.begun.wait(TIMEOUT_S)
    decoding.resume()
    assert ended.get(timeout=TIMEOUT_S).result().maps
    assert decoding.count == 1
    assert server.engine.rows_owed() == 0


def test_a_wrong_field_is_reported_before_a_full_queue(stub: ExplainServiceStub, decoding: BlockedDecoding) -> None:
    first = stub.Explain.future(explain_request(), timeout=TIMEOUT_S)
    assert decoding.begun.wait(TIMEOUT_S)
    over_budget, no_image = explain_request(), explain_request(image=pb.Image())
    over_budget.budget = 1
    for wrong in (explain_request("opti-cam", steps=0), over_budget, no_image):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Explain(wrong, timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        stub.Explain(explain_request(), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    decoding.resume()
    assert first.result().maps


def test_reserved_rows_are_in_the_metric_of_queued_rows(
    server: Server, stub: ExplainServiceStub, decoding: BlockedDecoding
) -> None:
    first = stub.Explain.future(explain_request(), timeout=TIMEOUT_S)
    assert decoding.begun.wait(TIMEOUT_S)
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=TIMEOUT_S) as page:
        assert re.search(rb"^camserve_queue_rows 2\.0$", page.read(), re.MULTILINE)
    decoding.resume()
    assert first.result().cost.rows == 2


def test_a_failed_decoding_releases_the_reservation(
    server: Server, stub: ExplainServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    owed, original = [], requests.decode_pixels

    def noted(*args: Any) -> requests.Pixels:
        owed.append(server.engine.rows_owed())
        return original(*args)

    monkeypatch.setattr(requests, "decode_pixels", noted)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Explain(explain_request(image=pb.Image(encoded=b"no image")), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert owed == [2]
    assert server.engine.rows_owed() == 0


@pytest.mark.parametrize("rpc", ["Explain", "ExplainStream"])
def test_a_cancelled_call_releases_its_reservation_during_decoding(
    server: Server, stub: ExplainServiceStub, decoding: BlockedDecoding, monkeypatch: pytest.MonkeyPatch, rpc: str
) -> None:
    released, release = threading.Event(), Admission.release

    def noted(admission: Admission, request: int) -> None:
        release(admission, request)
        released.set()

    monkeypatch.setattr(Admission, "release", noted)
    if rpc == "Explain":
        running: Any = stub.Explain.future(explain_request(), timeout=TIMEOUT_S)
    else:
        running = stub.ExplainStream(pb.ExplainStreamRequest(request=explain_request()), timeout=TIMEOUT_S)
    assert decoding.begun.wait(TIMEOUT_S)
    assert server.engine.rows_owed() == 2
    running.cancel()
    assert released.wait(TIMEOUT_S)
    assert server.engine.rows_owed() == 0
    decoding.resume()
    assert stub.Explain(explain_request(), timeout=TIMEOUT_S).maps, "the next request is admitted"


@pytest.mark.slow
def test_a_request_that_decodes_while_the_engine_closes_is_unavailable(decoding: BlockedDecoding) -> None:
    with serving(CONFIG) as server, grpc.insecure_channel(server.address) as channel:
        running = ExplainServiceStub(channel).Explain.future(explain_request(), timeout=TIMEOUT_S)
        assert decoding.begun.wait(TIMEOUT_S)
        server.engine.close()
        decoding.resume()
        assert running.code() is grpc.StatusCode.UNAVAILABLE
        assert server.engine.rows_owed() == 0


@pytest.mark.parametrize(
    ("rpc", "levels", "randomised"),
    [
        ("Explain", False, False),
        ("ExplainStream", True, True),
        ("Evaluate", False, False),
        ("EvaluateStream", False, True),
    ],
)
def test_intermediate_maps_are_encoded_only_for_calls_that_return_them(
    stub: ExplainServiceStub, monkeypatch: pytest.MonkeyPatch, rpc: str, levels: bool, randomised: bool
) -> None:
    calls = Calls(monkeypatch)
    calls.count(responses, "level")
    calls.count(responses, "randomised")
    explain = explain_request("poly-cam")
    explain.metrics.add(name="randomisation-spearman").parameters.update({"steps": 2})
    messages = call(stub, rpc, explain, evaluate_request("poly-cam", randomisation_spearman={"steps": 2}))
    assert calls.counts["responses.level"] == sum(
        rpc == "ExplainStream" and each.WhichOneof("event") == "level" for each in messages
    )
    assert (calls.counts["responses.level"] > 0, calls.counts["responses.randomised"] > 0) == (levels, randomised)


def test_maps_are_finished_on_the_engines_thread_only_for_metrics(
    stub: ExplainServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    finish = request_result.finish_maps

    def spy(*args: Any) -> Any:
        threads.append(threading.current_thread().name.partition("_")[0])
        return finish(*args)

    for module in (request_plan, request_result, responses):
        monkeypatch.setattr(module, "finish_maps", spy)
    alone = stub.Explain(explain_request(), timeout=TIMEOUT_S)
    assert threads == ["codec"]
    request = explain_request()
    request.metrics.add(name="average-drop")
    scored = stub.Explain(request, timeout=TIMEOUT_S)
    assert threads == ["codec", "engine"]
    assert scored.maps[0].saliency == alone.maps[0].saliency
    streamed = call(stub, "ExplainStream", explain_request("poly-cam"), evaluate_request())
    assert set(threads[2:]) == {"codec"}, "levels, too"
    assert len(threads[2:]) == 1 + sum(message.HasField("level") for message in streamed)
