"""The result cache on real servers: which responses are stored, and for whom."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
from prometheus_client.parser import text_string_to_metric_families

import camserve
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server.config import CacheConfig, Config, ModelConfig, TokenConfig
from camserve_server.open_inference import inference_pb2
from camserve_server.open_inference.inference_pb2_grpc import GRPCInferenceServiceStub
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.credentials import hashed
from tests.processes import CAMSERVE, completed, patient_client
from tests.promql import documented
from tests.server.service.frontends.test_calls import bearer, differing
from tests.server.service.test_errors import IMAGE, TIMEOUT_S, method, metric, request, tensor
from tests.support import stopped

TINY = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "listen": "127.0.0.1:0",
    "metrics_listen": "127.0.0.1:0",
    "models": [TINY],
    "cache": CacheConfig(),
}
MAP = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one process", "front ends"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving(Config(**SETTINGS, frontends=request.param)) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> ExplainServiceStub:
    return ExplainServiceStub(channel)


@pytest.fixture(autouse=True)
def _empty(server: Server) -> None:
    """Each test begins with an empty cache."""
    cache = server._servicer.cache
    assert cache is not None
    cache.memory._entries.clear()
    cache.memory.bytes = 0


def evaluate(**changes: Any) -> pb.EvaluateRequest:
    valid: dict[str, Any] = {"model": "tiny", "image": request().image, "metrics": [metric("insertion", steps=8)]}
    return pb.EvaluateRequest(**valid | changes)


def call(stub: ExplainServiceStub, rpc: str, message: Any) -> list[Any]:
    """Call an RPC; return all its messages."""
    match rpc:
        case "Explain" | "Evaluate":
            return [getattr(stub, rpc)(message, timeout=TIMEOUT_S)]
        case "heartbeats only":
            wrapped = pb.ExplainStreamRequest(request=message, heartbeats_only=True)
            return [each.result for each in stub.ExplainStream(wrapped, timeout=TIMEOUT_S) if each.HasField("result")]
        case _:
            wrap = getattr(pb, f"{rpc}Request")
            return [*getattr(stub, rpc)(wrap(request=message), timeout=TIMEOUT_S)]


def response(stub: ExplainServiceStub, message: Any) -> Any:
    [answer] = call(stub, "Explain" if isinstance(message, pb.ExplainRequest) else "Evaluate", message)
    return answer


def without_names(answer: Any) -> Any:
    """Return a copy of a response without what may differ between equal requests."""
    copy: Any = type(answer)()
    copy.CopyFrom(answer)
    for message, name in ((copy, "request_id"), (copy.receipt, "request_id"), (copy.cost, "cached")):
        message.ClearField(name)
    return copy


def values(server: Server) -> dict[str, float]:
    """Return the metrics of the cache."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=TIMEOUT_S) as page:
        families = [*text_string_to_metric_families(page.read().decode())]
    return {
        each.name: each.value
        for family in families
        for each in family.samples
        if each.name.startswith("camserve_cache")
    }


CASES: dict[str, tuple[str, Any]] = {
    "maps": ("Explain", request()),
    "maps of methods that scale them": ("Explain", request(method=method("poly-cam", variant="official"))),
    "scores": ("Explain", request(metrics=[metric("insertion", steps=8)], raw=True, target_top_k=2)),
    "small maps": ("Explain", request(map_format=pb.MapFormat(dtype="uint8", native=True))),
    "a budget": ("Explain", request(method=method("rise"), budget=40)),
    "a stream of heartbeats": ("heartbeats only", request(method=method("poly-cam"))),
    "a map of the caller": ("Evaluate", evaluate(saliency=tensor(MAP))),
    "the map of a method": ("Evaluate", evaluate(method=method("poly-cam"))),
    "a mask": ("Evaluate", evaluate(saliency=tensor(MAP), truth=pb.Truth(mask=tensor(np.eye(9))))),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_requests_have_equal_responses(server: Server, stub: ExplainServiceStub, name: str) -> None:
    rpc, message = CASES[name]
    message.request_id = "first"
    [first] = call(stub, rpc, message)
    rows = server.engine.counters.rows
    message.request_id, message.priority = "second", "low"
    [second] = call(stub, rpc, message)
    assert server.engine.counters.rows == rows
    assert (first.cost.cached, second.cost.cached) == (False, True)
    assert (second.request_id, second.receipt.request_id) == ("second", "second")
    assert differing([without_names(first)], [without_names(second)]) == []


def test_requests_that_differ_are_computed(stub: ExplainServiceStub) -> None:
    image = IMAGE.copy()
    image[0, 0, 0] ^= 1
    for other in (
        request(),
        request(method=method("hires-cam")),
        request(method=pb.MethodSpec(name="grad-cam", seed=1)),
        request(image=pb.Image(pixels=pb.Pixels(height=40, width=30, data=image.tobytes()))),
        request(top_k=2),
        evaluate(method=method("grad-cam")),
        evaluate(saliency=tensor(MAP)),
        evaluate(saliency=tensor(MAP / 2)),
    ):
        assert not response(stub, other).cost.cached


def test_all_rpcs_share_the_maps(server: Server, channel: grpc.Channel, stub: ExplainServiceStub) -> None:
    """Explain, its stream of heartbeats and ModelInfer are answered from the same entry."""
    explained = response(stub, request())
    assert call(stub, "heartbeats only", request())[0].cost.cached
    asked = inference_pb2.ModelInferRequest(model_name="tiny", id="mine", raw_input_contents=[IMAGE.tobytes()])
    asked.inputs.add(name="image", datatype="UINT8", shape=[1, *IMAGE.shape])
    asked.parameters["method"].string_param = "grad-cam"
    for outputs in (["saliency"], ["probability", "saliency"]):
        del asked.outputs[:]
        for name in outputs:
            asked.outputs.add(name=name)
        inferred = GRPCInferenceServiceStub(channel).ModelInfer(asked, timeout=TIMEOUT_S)
        assert inferred.parameters["cached"].bool_param
        assert inferred.id == "mine"
        assert [each.name for each in inferred.outputs] == outputs
        assert inferred.raw_output_contents[outputs.index("saliency")] == explained.maps[0].saliency.data


def test_inference_responses_are_computed_and_stored(channel: grpc.Channel, stub: ExplainServiceStub) -> None:
    asked = inference_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=[IMAGE.tobytes()])
    asked.inputs.add(name="image", datatype="UINT8", shape=[1, *IMAGE.shape])
    asked.parameters["method"].string_param = "grad-cam"
    first, second = (GRPCInferenceServiceStub(channel).ModelInfer(asked, timeout=TIMEOUT_S) for _ in range(2))
    assert not first.parameters["cached"].bool_param
    assert second.parameters["cached"].bool_param
    assert first.raw_output_contents == second.raw_output_contents
    assert response(stub, request()).cost.cached


def test_streams_return_stored_responses_without_other_events(stub: ExplainServiceStub) -> None:
    message = request(method=method("poly-cam"))
    *events, last = call(stub, "ExplainStream", message)
    assert [each for each in events if each.HasField("level")]
    assert not last.result.cost.cached
    [only] = call(stub, "ExplainStream", message)
    assert only.result.cost.cached
    assert differing([without_names(last.result)], [without_names(only.result)]) == []
    assert response(stub, message).cost.cached


@pytest.mark.parametrize("rpc", ["ExplainStream", "EvaluateStream"])
def test_streams_with_maps_of_random_networks_are_computed(stub: ExplainServiceStub, rpc: str) -> None:
    """The maps are a part of the result, and are not stored. Other calls do not return them."""
    metrics = [metric("randomisation-hog", steps=2)]
    explain = rpc == "ExplainStream"
    message: Any = request(metrics=metrics) if explain else evaluate(metrics=metrics, method=method("grad-cam"))
    first = response(stub, message)
    for _ in range(2):
        events = call(stub, rpc, message)
        assert len([each for each in events if each.HasField("randomised")]) == 2
        assert not events[-1].result.cost.cached
        last = events[-1].result
        assert (last.receipt.map_digests, last.cost.rows) == (first.receipt.map_digests, first.cost.rows)
    assert response(stub, message).cost.cached


@pytest.mark.slow  # starts three processes
def test_command_line_shows_that_a_result_is_cached(server: Server, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    PIL.Image.fromarray(IMAGE).save(image)
    command: list[str | Path] = [*CAMSERVE, "explain", image, "--address", server.address, "--out", tmp_path / "out"]
    first, second = (completed(command) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "cached" not in first.stdout
    assert "cached" in second.stdout
    record = json.loads(completed([*command, "--json"]).stdout)
    assert record["cost"]["cached"] is True


def test_replays_are_computed(server: Server) -> None:
    with patient_client(server.address) as client:
        receipt = client.explain(IMAGE, method="poly-cam", model="tiny").receipt
        assert client.explain(IMAGE, method="poly-cam", model="tiny").cost.cached
        for _ in range(2):
            replay = client.replay(receipt, IMAGE)
            assert replay.same
            assert not replay.explanation.cost.cached
            assert replay.explanation.cost.rows > 0


def test_client_shows_whether_a_result_is_cached(server: Server) -> None:
    with patient_client(server.address) as client:
        first, second = (client.evaluate(IMAGE, saliency=MAP, metrics=["insertion"]) for _ in range(2))
    assert (first.cost.cached, second.cost.cached) == (False, True)
    assert first.scores == second.scores
    assert first.cost.rows == second.cost.rows


@pytest.mark.parametrize(
    "wrong",
    [
        request(method=method("made-up")),
        request(image=pb.Image(encoded=b"no image")),
        request(method=method("score-cam"), budget=1),
        request(request_id="x" * 999),
    ],
    ids=["method", "image", "budget", "identifier"],
)
def test_errors_are_not_stored(server: Server, stub: ExplainServiceStub, wrong: pb.ExplainRequest) -> None:
    codes = []
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Explain(wrong, timeout=TIMEOUT_S)
        codes.append(caught.value.code())
    assert codes[0] is codes[1] is not grpc.StatusCode.OK
    assert values(server)["camserve_cache_entries"] == 0


def test_stored_responses_need_no_rows(stub: ExplainServiceStub, server: Server) -> None:
    """The engine runs nothing and owes as many rows as it may. A stored response is returned nevertheless."""
    stored = response(stub, request())
    with stopped(server.engine):
        endless = stub.Explain.future(request(method=method("rise", masks=150_000)), timeout=TIMEOUT_S)
        while not server.engine.rows_owed():
            assert not endless.done()
        owed = server.engine.rows_owed()
        with pytest.raises(grpc.RpcError) as refused:
            stub.Explain(request(method=method("rise", masks=150_000)), timeout=TIMEOUT_S)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        again = response(stub, request())
        assert again.cost.cached
        assert server.engine.rows_owed() == owed
        endless.cancel()
    assert differing([without_names(stored)], [without_names(again)]) == []


def test_stored_responses_need_the_permissions_of_others(stub: ExplainServiceStub) -> None:
    """All checks of a request come first."""
    assert response(stub, request()).maps
    with pytest.raises(grpc.RpcError) as caught:
        stub.Explain(request(priority="urgent"), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_metrics_count_hits_and_misses(server: Server, stub: ExplainServiceStub) -> None:
    before = values(server)
    for _ in range(3):
        answer = response(stub, request(method=method("xgrad-cam")))
    after = values(server)
    assert after["camserve_cache_hits_total"] - before["camserve_cache_hits_total"] == 2
    assert after["camserve_cache_misses_total"] - before["camserve_cache_misses_total"] == 1
    assert after["camserve_cache_entries"] == 1
    # A front end finishes the maps, so their entries contain the maps of the method, which are smaller.
    assert after["camserve_cache_bytes"] == pytest.approx(answer.ByteSize(), rel=0.9)
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=TIMEOUT_S) as page:
        families = {each.name: each for each in text_string_to_metric_families(page.read().decode())}
    described = documented()
    for name, family in families.items():
        if name.startswith("camserve_cache"):
            labels = {label for each in family.samples for label in each.labels}
            full = f"{name}_total" if family.type == "counter" else name
            assert described[full] == (family.type, labels)


# ---- callers and sizes -----------------------------------------------------------------------------------------------

TOKENS = [TokenConfig(name="anna", sha256=hashed("a")), TokenConfig(name="ben", sha256=hashed("b"))]


@pytest.mark.parametrize("frontends", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shared", [False, True])
def test_callers_share_responses_only_if_configured(shared: bool, frontends: int) -> None:
    cache = CacheConfig(shared=shared)
    with (
        serving(Config(**SETTINGS | {"cache": cache}, tokens=TOKENS, frontends=frontends)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = ExplainServiceStub(channel)

        def cached(secret: str) -> bool:
            return stub.Explain(request(), metadata=bearer(secret), timeout=TIMEOUT_S).cost.cached

        assert [cached("a"), cached("a"), cached("b"), cached("b"), cached("a")] == [False, True, shared, True, True]


def test_size_is_bounded() -> None:
    with serving(Config(**SETTINGS | {"cache": CacheConfig(max_bytes=20_000)})) as server:
        with patient_client(server.address) as client:
            costs = [client.explain(IMAGE, method="random", seed=seed).cost for seed in (0, 1, 2, 3, 4, 5, 5, 0)]
        assert [each.cached for each in costs] == [False] * 6 + [True, False]
        now = values(server)
    assert 0 < now["camserve_cache_bytes"] <= 20_000
    assert now["camserve_cache_evictions_total"] == 7 - now["camserve_cache_entries"]


def test_too_large_responses_are_not_stored() -> None:
    """The size of native maps of RISE is known only when they are made."""
    rise: dict[str, Any] = {"method": "rise", "parameters": {"masks": 4}, "top_k": 4, "native_maps": True}
    with (
        serving(Config(**SETTINGS, max_message_bytes=3 * 4096)) as server,
        patient_client(server.address) as client,
    ):
        for _ in range(2):
            with pytest.raises(camserve.TooLarge):
                client.explain(IMAGE, **rise)
        assert values(server)["camserve_cache_entries"] == 0
        assert not client.explain(IMAGE, **rise | {"top_k": 1}).cost.cached
        assert values(server)["camserve_cache_entries"] == 1


def test_cache_is_off_by_default() -> None:
    with serving(Config(**SETTINGS | {"cache": None})) as server, camserve.Client(server.address) as client:
        costs = [client.explain(IMAGE, method="grad-cam", timeout=TIMEOUT_S).cost for _ in range(2)]
        assert not any(each.cached for each in costs)
        assert values(server) == {}
