"""Formats of the maps in responses of a real server: types, native resolution, receipts and errors."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
import torch

import camserve
from camserve.map_format import restored
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server import registry
from camserve_server.plan import SaliencyMaps
from camserve_server.registry import METHODS
from camserve_server.request_result import finish_maps
from camserve_server.service.map_format import native_maps, tensor
from camserve_server.service.server import Server

TIMEOUT_S = 240.0
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
FORMATS = list(itertools.product(["float32", "float16", "uint8"], [False, True]))
# Largest error of a value in [0, 1].
BOUNDS = {"float32": 0.0, "float16": 2.0**-12, "uint8": 1 / 510}
OFFICIAL: dict[str, Any] = {"method": "poly-cam", "parameters": {"variant": "official"}}


@pytest.fixture
def client(server: Server) -> Iterator[camserve.Client]:
    with camserve.Client(server.address, timeout=TIMEOUT_S) as client:
        yield client


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[ExplainServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield ExplainServiceStub(channel)


def request(method: str = "grad-cam", **fields: Any) -> pb.ExplainRequest:
    image = pb.Image(pixels=pb.Pixels(height=40, width=30, data=IMAGE.tobytes()))
    return pb.ExplainRequest(model="tiny", image=image, method=pb.MethodSpec(name=method), **fields)


@pytest.mark.parametrize(
    ("dtype", "native", "shape", "size"),
    [
        ("", False, [32, 32], 4 * 32 * 32),
        ("float32", False, [32, 32], 4 * 32 * 32),
        ("float16", False, [32, 32], 2 * 32 * 32),
        ("uint8", False, [32, 32], 32 * 32),
        ("", True, [8, 8], 4 * 8 * 8),
        ("uint8", True, [8, 8], 8 * 8),
    ],
)
def test_response_has_the_requested_type_and_size(
    stub: ExplainServiceStub, dtype: str, native: bool, shape: list[int], size: int
) -> None:
    asked = request(map_format=pb.MapFormat(dtype=dtype, native=native), raw=True)
    answer = stub.Explain(asked, timeout=TIMEOUT_S).maps[0]
    assert (list(answer.saliency.shape), len(answer.saliency.data)) == (shape, size)
    assert answer.saliency.dtype == ("" if dtype == "float32" else dtype)
    assert list(answer.input_size) == ([32, 32] if native else [])
    assert (answer.raw.dtype, len(answer.raw.data)) == ("", 4 * 8 * 8), "the format does not affect `raw`"


def test_default_response_has_none_of_the_new_fields(stub: ExplainServiceStub) -> None:
    answer = stub.Explain(request(), timeout=TIMEOUT_S).maps[0]
    assert not {"input_size"} & {field.name for field, _ in answer.ListFields()}
    assert [field.name for field, _ in answer.saliency.ListFields()] == ["shape", "data"]


SLOW_METHODS = [pytest.param(name, marks=pytest.mark.slow) for name in ("poly-cam", "occlusion")]


@pytest.mark.parametrize("method", ["grad-cam", "random", "score-cam", *SLOW_METHODS])
def test_maps_and_receipts_of_all_formats_agree(client: camserve.Client, method: str) -> None:
    options: dict[str, Any] = {"model": "tiny", "method": method, "top_k": 2, "request_id": "same"}
    default = client.explain(IMAGE, **options)
    for dtype, native in FORMATS:
        e = client.explain(IMAGE, **options, map_dtype=dtype, native_maps=native)
        assert e.receipt == default.receipt
        for ours, theirs in zip(e.maps, default.maps, strict=True):
            assert ours.saliency.shape == (32, 32)
            assert ours.saliency.dtype == np.float32
            # Scaling by the minimum and maximum can double an error, and more if resizing has narrowed the range.
            bound = 4 * BOUNDS[dtype] + 1e-6 if native else BOUNDS[dtype] + 1e-7
            np.testing.assert_allclose(ours.saliency, theirs.saliency, rtol=0, atol=bound)
        if not native and dtype == "float32":
            assert np.array_equal(e.saliency, default.saliency)


def test_asyncio_client_restores_maps(client: camserve.Client, server: Server) -> None:
    async def explain() -> camserve.Explanation:
        async with camserve.aio.Client(server.address, timeout=TIMEOUT_S) as client:
            return await client.explain(IMAGE, model="tiny", method="grad-cam", native_maps=True)

    default = client.explain(IMAGE, model="tiny", method="grad-cam")
    np.testing.assert_allclose(asyncio.run(explain()).saliency, default.saliency, rtol=0, atol=1e-6)


def test_receipt_of_any_format_can_be_replayed(client: camserve.Client) -> None:
    e = client.explain(IMAGE, model="tiny", method="grad-cam", map_dtype="uint8", native_maps=True)
    replayed = client.replay(e.receipt, IMAGE)
    assert replayed.same
    assert not replayed.differences


@pytest.mark.parametrize(("dtype", "native"), [("float16", False), ("float32", True), ("uint8", True)])
def test_levels_have_the_requested_format(client: camserve.Client, dtype: str, native: bool) -> None:
    def levels(**options: Any) -> list[camserve.Level]:
        events = client.explain_stream(IMAGE, model="tiny", method="poly-cam", top_k=2, **options)
        return [event for event in events if isinstance(event, camserve.Level)]

    default = levels()
    formatted = levels(map_dtype=dtype, native_maps=native)
    assert len(default) == len(formatted) == 3
    for ours, theirs in zip(formatted, default, strict=True):
        assert (ours.layer, ours.index) == (theirs.layer, theirs.index)
        np.testing.assert_allclose(ours.maps, theirs.maps, rtol=0, atol=4 * BOUNDS[dtype] + 1e-6)


def test_messages_of_levels_and_randomised_maps_are_small(stub: ExplainServiceStub) -> None:
    asked = request("poly-cam", map_format=pb.MapFormat(dtype="uint8", native=True))
    asked.metrics.add(name="randomisation-spearman").parameters.update({"steps": 2})
    events = [*stub.ExplainStream(pb.ExplainStreamRequest(request=asked), timeout=TIMEOUT_S)]
    levels = [each.level for each in events if each.WhichOneof("event") == "level"]
    steps = [each.randomised for each in events if each.WhichOneof("event") == "randomised"]
    assert [list(level.saliency[0].shape) for level in levels] == [[8, 8], [16, 16], [32, 32]]
    assert all(level.saliency[0].dtype == "uint8" and list(level.input_size) == [32, 32] for level in levels)
    assert steps
    assert all((list(each.saliency.shape), each.saliency.dtype) == ([32, 32], "uint8") for each in steps)


def test_scores_do_not_depend_on_the_format(client: camserve.Client) -> None:
    options: dict[str, Any] = {"model": "tiny", "method": "grad-cam", "metrics": ["insertion"]}
    default = client.evaluate(IMAGE, **options)
    e = client.evaluate(IMAGE, **options, map_dtype="uint8", native_maps=True)
    assert e.scores == default.scores
    np.testing.assert_allclose(e.saliency, default.saliency, rtol=0, atol=4 * BOUNDS["uint8"])


def test_map_of_the_caller_keeps_its_values_at_native_resolution(client: camserve.Client) -> None:
    half = np.linspace(0.25, 0.5, 64, dtype=np.float32).reshape(8, 8)
    options: dict[str, Any] = {"model": "tiny", "saliency": half, "metrics": ["insertion"]}
    default = client.evaluate(IMAGE, **options).saliency
    assert np.array_equal(client.evaluate(IMAGE, **options, native_maps=True).saliency, default)
    small = client.evaluate(IMAGE, **options, native_maps=True, map_dtype="uint8").saliency
    np.testing.assert_allclose(small, default, rtol=0, atol=BOUNDS["uint8"] + 1e-7)
    assert default.max() < 0.51, "the map of the caller is not scaled"


def test_unknown_type_is_refused(client: camserve.Client) -> None:
    with pytest.raises(camserve.InvalidArgument, match="expected float32, float16, uint8 or empty") as raised:
        client.explain(IMAGE, model="tiny", method="grad-cam", map_dtype="int4")
    assert raised.value.field == "map_format.dtype"


@pytest.mark.parametrize("rpc", ["explain", "explain_stream", "evaluate"])
def test_methods_that_scale_their_maps_refuse_native_resolution(client: camserve.Client, rpc: str) -> None:
    metrics = {"metrics": ["insertion"]} if rpc == "evaluate" else {}
    with pytest.raises(camserve.InvalidArgument, match=r"omit map_format\.native") as raised:
        result = getattr(client, rpc)(IMAGE, model="tiny", **OFFICIAL, native_maps=True, **metrics)
        next(iter(result))
    assert raised.value.field == "map_format.native"
    e = client.explain(IMAGE, model="tiny", **OFFICIAL, map_dtype="float16")
    default = client.explain(IMAGE, model="tiny", **OFFICIAL)
    np.testing.assert_allclose(e.saliency, default.saliency, rtol=0, atol=BOUNDS["float16"])


def test_method_that_scales_its_maps_without_saying_so_is_refused(
    client: camserve.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    undeclared = replace(METHODS["poly-cam"], own_scaling=METHODS["grad-cam"].own_scaling)
    monkeypatch.setitem(registry.METHODS, "poly-cam", undeclared)
    with pytest.raises(camserve.InvalidArgument) as raised:
        client.explain(IMAGE, model="tiny", **OFFICIAL, native_maps=True)
    assert raised.value.field == "map_format.native"


@pytest.mark.parametrize("field", ["image", "saliency", "mask"])
def test_tensors_of_requests_must_be_float32(stub: ExplainServiceStub, field: str) -> None:
    half = pb.Tensor(shape=[2, 2], data=bytes(8), dtype="float16")
    image = request().image if field != "image" else pb.Image(tensor=half)
    asked = pb.EvaluateRequest(model="tiny", image=image, metrics=[pb.MetricSpec(name="insertion")])
    if field == "saliency":
        asked.saliency.CopyFrom(half)
    else:
        asked.method.name = "grad-cam"
    if field == "mask":
        asked.truth.mask.CopyFrom(half)
    with pytest.raises(grpc.RpcError, match="must contain float32") as raised:
        stub.Evaluate(asked, timeout=TIMEOUT_S)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# ---- single maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "shape"),
    [
        (torch.arange(12.0).reshape(3, 4), (3, 4)),
        (torch.full((3, 4), 7.0), (3, 4)),
        (1000 + torch.arange(12.0).reshape(3, 4) / 100, (32, 32)),
        (torch.arange(12.0).reshape(3, 4).where(torch.eye(3, 4) == 0, torch.nan), (3, 4)),
        (torch.arange(12.0).reshape(3, 4).where(torch.eye(3, 4) == 0, torch.inf), (3, 4)),
        (torch.arange(12.0, dtype=torch.float64).reshape(3, 4) * 1e300, (32, 32)),
        (torch.arange(40.0 * 50).reshape(40, 50), (32, 32)),
    ],
    ids=["ramp", "constant", "low contrast", "NaN", "infinity", "overflow in float32", "larger than the input"],
)
def test_map_is_native_only_if_it_can_be_restored(raw: torch.Tensor, shape: tuple[int, int]) -> None:
    full = finish_maps(SaliencyMaps(raw[None]), (32, 32)).maps.float()
    (returned,) = native_maps(raw[None], full, own_scaling=False)
    assert tuple(returned.shape) == shape
    assert returned.isfinite().all()
    if shape == (32, 32):
        assert torch.equal(returned, full[0])
    else:
        np.testing.assert_allclose(restored(returned.numpy(), (32, 32)), full[0], rtol=0, atol=1e-6)


def test_types_round_to_the_nearest_value() -> None:
    values = torch.tensor([[0, 1, 0.5 / 255, 1.49 / 255, 0.1]])
    assert np.frombuffer(tensor(values, "uint8").data, np.uint8).tolist() == [0, 255, 0, 1, 26]
    assert np.frombuffer(tensor(values, "float16").data, "<f2").tolist() == np.float16(values[0]).tolist()
    assert np.frombuffer(tensor(values, "float32").data, "<f4").tolist() == values[0].tolist()
