"""Errors over a real channel: status code, field and reason of each. The server keeps serving after every error."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
from google.rpc import error_details_pb2, status_pb2

import camserve
from camserve import errors
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server import request_plan
from camserve_server.config import Config, ModelConfig
from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Limits
from camserve_server.models.throughput import Throughput
from camserve_server.service import servicer
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.support import stopped

TIMEOUT_S = 120.0  # of calls that succeed on every machine
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[ExplainServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield ExplainServiceStub(channel)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def tensor(array: np.ndarray) -> pb.Tensor:
    return pb.Tensor(shape=array.shape, data=array.astype("<f4").tobytes())


def request(**changes: Any) -> pb.ExplainRequest:
    """Return a valid request for the tiny model with some fields replaced."""
    valid: dict[str, Any] = {
        "model": "tiny",
        "image": pb.Image(pixels=pb.Pixels(height=40, width=30, data=IMAGE.tobytes())),
        "method": method("grad-cam"),
    }
    return pb.ExplainRequest(**{**valid, **changes})


def method(name: str, layers: tuple[str, ...] = (), **parameters: str | float) -> pb.MethodSpec:
    spec = pb.MethodSpec(name=name, layers=layers)
    spec.parameters.update(parameters)
    return spec


def metric(name: str, **parameters: str | float) -> pb.MetricSpec:
    spec = pb.MetricSpec(name=name)
    spec.parameters.update(parameters)
    return spec


def box(left: float, top: float, right: float, bottom: float) -> pb.Box:
    return pb.Box(left=left, top=top, right=right, bottom=bottom)


TINY = np.zeros((3, 32, 32), np.float32)
NAN = np.full((3, 32, 32), np.nan, np.float32)
WIDE = pb.Image(pixels=pb.Pixels(height=10_000, width=10_000))

CASES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # name: changed fields, status code, field of the error, reason
    "no image": ({"image": pb.Image()}, "INVALID_ARGUMENT", "image", "INVALID"),
    "bytes that are not an image": (
        {"image": pb.Image(encoded=b"\x00" * 99)},
        "INVALID_ARGUMENT",
        "image.encoded",
        "UNREADABLE_IMAGE",
    ),
    "a truncated image": (
        {"image": pb.Image(encoded=png(IMAGE)[:500])},
        "INVALID_ARGUMENT",
        "image.encoded",
        "UNREADABLE_IMAGE",
    ),
    "pixels that do not match their shape": (
        {"image": pb.Image(pixels=pb.Pixels(height=40, width=31, data=IMAGE.tobytes()))},
        "INVALID_ARGUMENT",
        "image.pixels.data",
        "WRONG_SHAPE",
    ),
    "a negative height": (
        {"image": pb.Image(pixels=pb.Pixels(height=-40, width=-30, data=IMAGE.tobytes()))},
        "INVALID_ARGUMENT",
        "image.pixels",
        "INVALID",
    ),
    "a tensor of the wrong size": (
        {"image": pb.Image(tensor=tensor(TINY[:, 1:]))},
        "INVALID_ARGUMENT",
        "image.tensor.shape",
        "WRONG_SHAPE",
    ),
    "a tensor that does not match its shape": (
        {"image": pb.Image(tensor=pb.Tensor(shape=[3, 32, 32], data=b"1234"))},
        "INVALID_ARGUMENT",
        "image.tensor.data",
        "WRONG_SHAPE",
    ),
    "a tensor with NaN": (
        {"image": pb.Image(tensor=tensor(NAN))},
        "INVALID_ARGUMENT",
        "image.tensor.data",
        "NOT_FINITE",
    ),
    "an image that is too large": ({"image": WIDE}, "RESOURCE_EXHAUSTED", "image.pixels", "TOO_LARGE"),
    "an unknown model": ({"model": "resnet51"}, "NOT_FOUND", "model", "UNKNOWN_NAME"),
    "no method": ({"method": pb.MethodSpec()}, "INVALID_ARGUMENT", "method.name", "INVALID"),
    "an unknown method": ({"method": method("crystal-ball")}, "NOT_FOUND", "method.name", "UNKNOWN_NAME"),
    "an unknown metric": ({"metrics": [metric("beauty")]}, "NOT_FOUND", "metrics[0].name", "UNKNOWN_NAME"),
    "an unknown parameter": (
        {"method": method("opti-cam", speed=2)},
        "INVALID_ARGUMENT",
        "method.parameters.speed",
        "INVALID",
    ),
    "a parameter of the wrong type": (
        {"method": method("opti-cam", steps="many")},
        "INVALID_ARGUMENT",
        "method.parameters.steps",
        "INVALID",
    ),
    "a fraction for an integer parameter": (
        {"method": method("opti-cam", steps=2.5)},
        "INVALID_ARGUMENT",
        "method.parameters.steps",
        "INVALID",
    ),
    "a parameter out of range": (
        {"method": method("opti-cam", steps=0)},
        "INVALID_ARGUMENT",
        "method.parameters.steps",
        "OUT_OF_RANGE",
    ),
    "a parameter that is NaN": (
        {"method": method("opti-cam", rate=float("nan"))},
        "INVALID_ARGUMENT",
        "method.parameters.rate",
        "OUT_OF_RANGE",
    ),
    "a parameter that is not a choice": (
        {"method": method("opti-cam", norm="l2")},
        "INVALID_ARGUMENT",
        "method.parameters.norm",
        "INVALID",
    ),
    "a parameter of a metric out of range": (
        {"metrics": [metric("insertion"), metric("deletion", steps=-1)]},
        "INVALID_ARGUMENT",
        "metrics[1].parameters.steps",
        "OUT_OF_RANGE",
    ),
    "an unknown layer": (
        {"method": method("poly-cam", ("r1", "r4"))},
        "INVALID_ARGUMENT",
        "method.layers[1]",
        "INVALID",
    ),
    "layers from coarse to fine": (
        {"method": method("poly-cam", ("r3", "r1"))},
        "INVALID_ARGUMENT",
        "method.layers",
        "INVALID",
    ),
    "a layer twice": (
        {"method": method("poly-cam", ("r1", "r1#1"))},
        "INVALID_ARGUMENT",
        "method.layers[1]",
        "INVALID",
    ),
    "two layers for a method that uses one": (
        {"method": method("grad-cam", ("r1", "r3"))},
        "INVALID_ARGUMENT",
        "method.layers",
        "INVALID",
    ),
    "a target out of range": (
        {"targets": [pb.Target(index=0), pb.Target(index=7)]},
        "INVALID_ARGUMENT",
        "targets[1].index",
        "INVALID",
    ),
    "a label for a model without labels": (
        {"targets": [pb.Target(label="cat")]},
        "INVALID_ARGUMENT",
        "targets[0].label",
        "INVALID",
    ),
    "an unknown label": (
        {"model": "efficientnet-lite0", "targets": [pb.Target(label="tabby katze")]},
        "INVALID_ARGUMENT",
        "targets[0].label",
        "INVALID",
    ),
    "an ambiguous label": (
        {"model": "efficientnet-lite0", "targets": [pb.Target(label="CARDIGAN")]},
        "INVALID_ARGUMENT",
        "targets[0].label",
        "INVALID",
    ),
    "an empty target": ({"targets": [pb.Target()]}, "INVALID_ARGUMENT", "targets[0]", "INVALID"),
    "top_k out of range": ({"top_k": -1}, "INVALID_ARGUMENT", "top_k", "OUT_OF_RANGE"),
    "too many targets": ({"targets": [pb.Target(index=0)] * 65}, "INVALID_ARGUMENT", "targets", "OUT_OF_RANGE"),
    "a metric without the location of the target": (
        {"metrics": [metric("insertion"), metric("pixel-f1")]},
        "INVALID_ARGUMENT",
        "truth",
        "INVALID",
    ),
    "a truth without boxes or mask": ({"truth": pb.Truth()}, "INVALID_ARGUMENT", "truth", "INVALID"),
    "a box beyond the image": (
        {"truth": pb.Truth(boxes=[box(0, 0, 1, 1), box(0, 0, 1, 1.1)])},
        "INVALID_ARGUMENT",
        "truth.boxes[1]",
        "OUT_OF_RANGE",
    ),
    "a box with NaN": (
        {"truth": pb.Truth(boxes=[box(float("nan"), 0, 1, 1)])},
        "INVALID_ARGUMENT",
        "truth.boxes[0]",
        "OUT_OF_RANGE",
    ),
    "a box without area": (
        {"truth": pb.Truth(boxes=[box(0.5, 0, 0.5, 1)])},
        "INVALID_ARGUMENT",
        "truth.boxes[0]",
        "INVALID",
    ),
    "too many boxes": (
        {"truth": pb.Truth(boxes=[box(0, 0, 1, 1)] * 257)},
        "INVALID_ARGUMENT",
        "truth.boxes",
        "OUT_OF_RANGE",
    ),
    "a mask with channels": (
        {"truth": pb.Truth(mask=tensor(TINY))},
        "INVALID_ARGUMENT",
        "truth.mask.shape",
        "WRONG_SHAPE",
    ),
    "a mask with NaN": (
        {"truth": pb.Truth(mask=tensor(NAN[0]))},
        "INVALID_ARGUMENT",
        "truth.mask.data",
        "NOT_FINITE",
    ),
    "a mask up to 255": (
        {"truth": pb.Truth(mask=tensor(255 + TINY[0]))},
        "INVALID_ARGUMENT",
        "truth.mask.data",
        "OUT_OF_RANGE",
    ),
    "an empty mask": (
        {"truth": pb.Truth(mask=tensor(TINY[0]))},
        "INVALID_ARGUMENT",
        "truth.mask.data",
        "INVALID",
    ),
    "a request id with a line break": ({"request_id": "a\nb"}, "INVALID_ARGUMENT", "request_id", "INVALID"),
}


def details(error: grpc.RpcError) -> dict[str, Any]:
    """Return the google.rpc details of an error by the name of their type."""
    status = status_pb2.Status.FromString(trailing_metadata(error)["grpc-status-details-bin"])
    assert status.message == error.details()
    unpacked = {}
    for packed in status.details:
        kind = packed.type_url.rpartition(".")[2]
        unpacked[kind] = getattr(error_details_pb2, kind).FromString(packed.value)
    return unpacked


def trailing_metadata(error: grpc.RpcError) -> dict[str, Any]:
    metadata: Any = error.trailing_metadata()
    return dict(iter(metadata))  # pairs, those of grpc or of grpc.aio


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rpc", ["Explain", "ExplainStream"])
def test_explain_names_the_wrong_field(stub: ExplainServiceStub, name: str, rpc: str) -> None:
    changes, code, field, reason = CASES[name]
    wrong = request(**{"request_id": "r-1", **changes})
    with pytest.raises(grpc.RpcError) as caught:
        if rpc == "Explain":
            stub.Explain(wrong, timeout=TIMEOUT_S)
        else:
            list(stub.ExplainStream(pb.ExplainStreamRequest(request=wrong), timeout=TIMEOUT_S))
    error: Any = caught.value
    assert error.code().name == code, error.details()
    info = details(error)
    assert info["ErrorInfo"].reason == reason
    assert info["ErrorInfo"].domain == "camserve"
    assert info["ErrorInfo"].metadata["field"] == field
    assert info["RequestInfo"].request_id == wrong.request_id
    if code == "INVALID_ARGUMENT":
        assert info["BadRequest"].field_violations[0].field == field
    if code == "NOT_FOUND":
        assert info["ErrorInfo"].metadata["known"]
    if code == "RESOURCE_EXHAUSTED":
        assert trailing_metadata(error)["grpc-retry-pushback-ms"] == "-1", "a retry cannot succeed"
    assert "Traceback" not in error.details()
    assert stub.Explain(request(), timeout=TIMEOUT_S).maps, "the server keeps serving"


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({}, "INVALID_ARGUMENT", "subject"),
        ({"saliency": tensor(TINY)}, "INVALID_ARGUMENT", "saliency.shape"),
        ({"saliency": tensor(2 + TINY[0])}, "INVALID_ARGUMENT", "saliency.data"),
        ({"saliency": tensor(NAN[0])}, "INVALID_ARGUMENT", "saliency.data"),
        ({"method": method("grad-cam"), "metrics": []}, "INVALID_ARGUMENT", "metrics"),
        ({"method": method("grad-cam"), "target": pb.Target(index=-1)}, "INVALID_ARGUMENT", "target.index"),
        ({"method": method("none-such")}, "NOT_FOUND", "method.name"),
        ({"method": method("grad-cam"), "metrics": [metric("box-accuracy")]}, "INVALID_ARGUMENT", "truth"),
        ({"method": method("grad-cam"), "truth": pb.Truth()}, "INVALID_ARGUMENT", "truth"),
    ],
)
def test_evaluate_names_the_wrong_field(
    stub: ExplainServiceStub, changes: dict[str, Any], code: str, field: str
) -> None:
    valid: dict[str, Any] = {"model": "tiny", "image": request().image, "metrics": [metric("average-gain")]}
    with pytest.raises(grpc.RpcError) as caught:
        stub.Evaluate(pb.EvaluateRequest(**{**valid, **changes}), timeout=TIMEOUT_S)
    assert caught.value.code().name == code
    assert details(caught.value)["ErrorInfo"].metadata["field"] == field


@pytest.mark.slow
def test_message_over_the_size_limit_is_refused(stub: ExplainServiceStub) -> None:
    large = request(image=pb.Image(encoded=b"\x00" * (65 << 20)))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Explain(large, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.Explain(request(), timeout=TIMEOUT_S).maps


def wait_until_idle(engine: Engine) -> None:
    """Wait for requests of other tests that have been cancelled."""
    until = time.monotonic() + TIMEOUT_S
    while engine.rows_owed():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow
def test_deadline_that_passes_in_the_queue_costs_no_rows(server: Server) -> None:
    wait_until_idle(server.engine)
    rows_before = server.engine.counters.rows
    with camserve.Client(server.address, timeout=TIMEOUT_S) as client:
        with stopped(server.engine), pytest.raises(camserve.DeadlineExceeded):
            client.explain(IMAGE, model="tiny", method="grad-cam", timeout=1)
        assert client.explain(IMAGE, model="tiny", method="grad-cam").maps
    assert server.engine.counters.rows == rows_before + 2


def test_deadline_that_cannot_be_met_is_refused_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until_idle(server.engine)
    rows_before = server.engine.counters.rows
    monkeypatch.setattr(Throughput, "best", lambda self: 1.0)
    with camserve.Client(server.address) as client:
        with pytest.raises(camserve.DeadlineExceeded, match="that takes at least") as caught:
            client.explain(IMAGE, model="tiny", method="integrated-gradients", timeout=40, parameters={"steps": 50})
        assert caught.value.reason == "DEADLINE_UNREACHABLE"
    assert server.engine.counters.rows == rows_before


@pytest.mark.slow
def test_method_that_can_stop_early_returns_a_partial_map(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time from which queries are answered early is set here; test_request_plan.py tests its computation."""
    compute_limits = request_plan.limits

    def stop_soon(*args: Any, **kwargs: Any) -> Limits:
        return replace(compute_limits(*args, **kwargs), answer_early_from=time.monotonic() + 1)

    with camserve.Client(server.address, timeout=TIMEOUT_S) as client:
        with monkeypatch.context() as patch:
            patch.setattr(servicer, "limits", stop_soon)
            explanation = client.explain(
                IMAGE, model="tiny", method="rise", parameters={"masks": 1_000_000}, metrics=["average-gain"]
            )
        assert 0 < explanation.share < 1
        assert explanation.receipt.budget > 0
        assert client.replay(explanation.receipt, IMAGE).same


class Flat:
    """Factory of a network without a spatial layer."""

    def __new__(cls) -> Any:
        from torch import nn

        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))


@pytest.mark.slow
def test_methods_that_a_model_cannot_serve_are_refused_and_listed() -> None:
    flat = ModelConfig(
        name="flat", source="python:tests.server.service.test_errors:Flat", input_size=(8, 8), batch_size=2
    )
    with serving(Config(listen="127.0.0.1:0", models=[flat])) as server, camserve.Client(server.address) as client:
        with pytest.raises(camserve.FailedPrecondition) as caught:
            client.explain(IMAGE, method="grad-cam")
        assert "spatial" in str(caught.value)
        gradients = {"gradient-shap", "input-x-gradient", "integrated-gradients", "smooth-grad"}
        controls = {"center-gaussian", "fake-cam", "random"}
        assert set(client.models()[0].methods) == {*gradients, *controls, "occlusion", "rise"}
        for method in client.methods("flat"):
            assert bool(method.unavailable) == (method.name not in client.models()[0].methods)
        assert "average pooling" in next(m for m in client.methods("flat") if m.name == "cam").unavailable
        assert client.explain(IMAGE, method="occlusion").saliency.shape == (8, 8)


def test_full_queue_is_refused_with_a_retry_delay_before_decoding() -> None:
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=1)
    config = Config(listen="127.0.0.1:0", models=[tiny], max_rows_owed=900)
    with (
        serving(config) as server,
        camserve.Client(server.address, timeout=300) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        stream = client.explain_stream(IMAGE, method="opti-cam", parameters={"steps": 5000})
        next(stream)
        # A plain channel is used because that of the client would wait and retry.
        refusable = request(model="", method=method("opti-cam", steps=500))
        with stopped(server.engine):  # so that the stream owes its rows meanwhile
            with pytest.raises(grpc.RpcError) as caught:
                ExplainServiceStub(channel).Explain(refusable, timeout=TIMEOUT_S)
            refused = errors.from_rpc(caught.value, address=server.address, timeout_s=None)
            assert isinstance(refused, camserve.ResourceExhausted)
            assert refused.reason == "QUEUE_FULL"
            assert refused.retry_after_s is not None
            assert refused.retry_after_s > 0
            # An image that cannot be read shows that a refused request is not decoded.
            refusable.image.CopyFrom(pb.Image(encoded=b"no image"))
            with pytest.raises(grpc.RpcError) as caught:
                ExplainServiceStub(channel).Explain(refusable, timeout=TIMEOUT_S)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        stream.close()
