"""The table of errors, each over a real channel: its code, field and reason; and the server goes on."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
from google.rpc import error_details_pb2, status_pb2

import camserve
from camserve import errors, request_messages
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server.config import Config, ModelConfig
from camserve_server.service.server import Server
from tests.conftest import serving

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[ExplainServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield ExplainServiceStub(channel)


def png(picture: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "PNG", **options)
    return file.getvalue()


def tensor(array: np.ndarray) -> pb.Tensor:
    return pb.Tensor(shape=array.shape, data=array.astype("<f4").tobytes())


def request(**changes: Any) -> pb.ExplainRequest:
    """A good request of the tiny model, changed."""
    good: dict[str, Any] = {
        "model": "tiny",
        "image": pb.Image(pixels=pb.Pixels(height=40, width=30, data=PICTURE.tobytes())),
        "method": method("grad-cam"),
    }
    return pb.ExplainRequest(**{**good, **changes})


def method(name: str, layers: tuple[str, ...] = (), **parameters: object) -> pb.MethodSpec:
    spec = pb.MethodSpec(name=name, layers=layers)
    spec.parameters.update(parameters)
    return spec


def metric(name: str, **parameters: object) -> pb.MetricSpec:
    spec = pb.MetricSpec(name=name)
    spec.parameters.update(parameters)
    return spec


def box(left: float, top: float, right: float, bottom: float) -> pb.Box:
    return pb.Box(left=left, top=top, right=right, bottom=bottom)


TINY = np.zeros((3, 32, 32), np.float32)
NAN = np.full((3, 32, 32), np.nan, np.float32)
WIDE = pb.Image(pixels=pb.Pixels(height=10_000, width=10_000))

CASES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # what is wrong: changes, code, field, reason
    "no image": ({"image": pb.Image()}, "INVALID_ARGUMENT", "image", "INVALID"),
    "not an image": (
        {"image": pb.Image(encoded=b"\x00" * 99)},
        "INVALID_ARGUMENT",
        "image.encoded",
        "UNREADABLE_IMAGE",
    ),
    "a truncated image": (
        {"image": pb.Image(encoded=png(PICTURE)[:500])},
        "INVALID_ARGUMENT",
        "image.encoded",
        "UNREADABLE_IMAGE",
    ),
    "pixels of another shape": (
        {"image": pb.Image(pixels=pb.Pixels(height=40, width=31, data=PICTURE.tobytes()))},
        "INVALID_ARGUMENT",
        "image.pixels.data",
        "WRONG_SHAPE",
    ),
    "a negative height": (
        {"image": pb.Image(pixels=pb.Pixels(height=-40, width=-30, data=PICTURE.tobytes()))},
        "INVALID_ARGUMENT",
        "image.pixels",
        "INVALID",
    ),
    "a tensor of another size": (
        {"image": pb.Image(tensor=tensor(TINY[:, 1:]))},
        "INVALID_ARGUMENT",
        "image.tensor.shape",
        "WRONG_SHAPE",
    ),
    "a tensor that lies about its shape": (
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
    "an image too large": ({"image": WIDE}, "RESOURCE_EXHAUSTED", "image.pixels", "TOO_LARGE"),
    "unknown model": ({"model": "resnet51"}, "NOT_FOUND", "model", "UNKNOWN_NAME"),
    "no method": ({"method": pb.MethodSpec()}, "INVALID_ARGUMENT", "method.name", "INVALID"),
    "unknown method": ({"method": method("crystal-ball")}, "NOT_FOUND", "method.name", "UNKNOWN_NAME"),
    "unknown metric": ({"metrics": [metric("beauty")]}, "NOT_FOUND", "metrics[0].name", "UNKNOWN_NAME"),
    "unknown parameter": (
        {"method": method("opti-cam", speed=2)},
        "INVALID_ARGUMENT",
        "method.parameters.speed",
        "INVALID",
    ),
    "parameter of another type": (
        {"method": method("opti-cam", steps="many")},
        "INVALID_ARGUMENT",
        "method.parameters.steps",
        "INVALID",
    ),
    "half a step": (
        {"method": method("opti-cam", steps=2.5)},
        "INVALID_ARGUMENT",
        "method.parameters.steps",
        "INVALID",
    ),
    "parameter out of range": (
        {"method": method("opti-cam", steps=0)},
        "INVALID_ARGUMENT",
        "method.parameters.steps",
        "OUT_OF_RANGE",
    ),
    "parameter that is not a number": (
        {"method": method("opti-cam", rate=float("nan"))},
        "INVALID_ARGUMENT",
        "method.parameters.rate",
        "OUT_OF_RANGE",
    ),
    "parameter none of the choices": (
        {"method": method("opti-cam", norm="l2")},
        "INVALID_ARGUMENT",
        "method.parameters.norm",
        "INVALID",
    ),
    "parameter of a metric": (
        {"metrics": [metric("insertion"), metric("deletion", steps=-1)]},
        "INVALID_ARGUMENT",
        "metrics[1].parameters.steps",
        "OUT_OF_RANGE",
    ),
    "unknown layer": (
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
    "two layers for one": (
        {"method": method("grad-cam", ("r1", "r3"))},
        "INVALID_ARGUMENT",
        "method.layers",
        "INVALID",
    ),
    "target out of range": (
        {"targets": [pb.Target(index=0), pb.Target(index=7)]},
        "INVALID_ARGUMENT",
        "targets[1].index",
        "INVALID",
    ),
    "label of a model without labels": (
        {"targets": [pb.Target(label="cat")]},
        "INVALID_ARGUMENT",
        "targets[0].label",
        "INVALID",
    ),
    "unknown label": (
        {"model": "efficientnet-lite0", "targets": [pb.Target(label="tabby katze")]},
        "INVALID_ARGUMENT",
        "targets[0].label",
        "INVALID",
    ),
    "ambiguous label": (
        {"model": "efficientnet-lite0", "targets": [pb.Target(label="CARDIGAN")]},
        "INVALID_ARGUMENT",
        "targets[0].label",
        "INVALID",
    ),
    "an empty target": ({"targets": [pb.Target()]}, "INVALID_ARGUMENT", "targets[0]", "INVALID"),
    "top_k out of range": ({"top_k": -1}, "INVALID_ARGUMENT", "top_k", "OUT_OF_RANGE"),
    "too many targets": ({"targets": [pb.Target(index=0)] * 65}, "INVALID_ARGUMENT", "targets", "OUT_OF_RANGE"),
    "a metric that is not told where the target is": (
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
    "a box that is not a number": (
        {"truth": pb.Truth(boxes=[box(float("nan"), 0, 1, 1)])},
        "INVALID_ARGUMENT",
        "truth.boxes[0]",
        "OUT_OF_RANGE",
    ),
    "a box inside out": (
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
    """The google.rpc details by their type's name."""
    metadata = dict(error.trailing_metadata())  # type: ignore[attr-defined]
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert status.message == error.details()  # type: ignore[attr-defined]
    unpacked = {}
    for any_ in status.details:
        kind = any_.type_url.rpartition(".")[2]
        unpacked[kind] = getattr(error_details_pb2, kind).FromString(any_.value)
    return unpacked


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rpc", ["Explain", "ExplainStream"])
def test_explain(stub: ExplainServiceStub, name: str, rpc: str) -> None:
    changes, code, field, reason = CASES[name]
    asked = request(**{"request_id": "r-1", **changes})
    with pytest.raises(grpc.RpcError) as caught:
        if rpc == "Explain":
            stub.Explain(asked, timeout=20)
        else:
            list(stub.ExplainStream(pb.ExplainStreamRequest(request=asked), timeout=20))
    error: Any = caught.value
    assert error.code().name == code, error.details()
    found = details(error)
    assert found["ErrorInfo"].reason == reason
    assert found["ErrorInfo"].domain == "camserve"
    assert found["ErrorInfo"].metadata["field"] == field
    assert found["RequestInfo"].request_id == asked.request_id
    if code == "INVALID_ARGUMENT":
        assert found["BadRequest"].field_violations[0].field == field
    if code == "NOT_FOUND":
        assert found["ErrorInfo"].metadata["known"]
    if code == "RESOURCE_EXHAUSTED":
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "-1", "no use to try again"
    assert "Traceback" not in error.details()
    assert stub.Explain(request(), timeout=20).maps, "the server goes on"


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
def test_evaluate(stub: ExplainServiceStub, changes: dict[str, Any], code: str, field: str) -> None:
    good: dict[str, Any] = {"model": "tiny", "image": request().image, "metrics": [metric("average-gain")]}
    with pytest.raises(grpc.RpcError) as caught:
        stub.Evaluate(pb.EvaluateRequest(**{**good, **changes}), timeout=20)
    assert caught.value.code().name == code  # type: ignore[attr-defined]
    assert details(caught.value)["ErrorInfo"].metadata["field"] == field


def test_a_message_too_large_is_refused_before_it_is_read(stub: ExplainServiceStub) -> None:
    asked = request(image=pb.Image(encoded=b"\x00" * (65 << 20)))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Explain(asked, timeout=20)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    assert stub.Explain(request(), timeout=20).maps


def test_a_deadline_that_passes(server: Server) -> None:
    """Behind others the deadline of a method that cannot stop early passes while it waits."""
    with camserve.Client(server.address) as client:
        others = [
            client.explain_stream(PICTURE, model="tiny", method="occlusion", parameters={"stride": 1}) for _ in range(3)
        ]
        for stream in others:
            next(iter(stream))
        with pytest.raises(camserve.DeadlineExceeded):
            client.explain(PICTURE, model="tiny", method="occlusion", parameters={"stride": 1}, timeout=0.2)
        assert client.explain(PICTURE, model="tiny", method="grad-cam").maps


def test_a_deadline_that_cannot_be_met_is_refused_at_once(server: Server) -> None:
    assert server.engine is not None
    while server.engine.rows_owed():  # what other tests have cancelled
        time.sleep(0.01)
    done = server.engine.counters.rows
    with camserve.Client(server.address) as client:
        with pytest.raises(camserve.DeadlineExceeded, match="that takes at least") as caught:
            client.explain(
                PICTURE, model="tiny", method="integrated-gradients", parameters={"steps": 1000}, timeout=0.03
            )
        assert caught.value.reason == "DEADLINE_UNREACHABLE"
    assert server.engine.counters.rows == done


def test_a_method_that_can_stop_early_meets_its_deadline(server: Server) -> None:
    with camserve.Client(server.address) as client:
        explanation = client.explain(
            PICTURE,
            model="tiny",
            method="rise",
            parameters={"masks": 1_000_000},
            metrics=["average-gain"],
            timeout=2.0,
        )
        assert 0 < explanation.share < 1
        assert explanation.receipt.budget > 0
        again = client.replay(explanation.receipt, PICTURE)
        assert again.same


class Flat:
    """A factory of a network without a spatial layer."""

    def __new__(cls) -> Any:
        from torch import nn

        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))


def test_what_a_model_cannot_serve() -> None:
    flat = ModelConfig(
        name="flat", source="python:tests.server.service.test_errors:Flat", input_size=(8, 8), batch_size=2
    )
    with serving(Config(listen="127.0.0.1:0", models=[flat])) as server, camserve.Client(server.address) as client:
        with pytest.raises(camserve.FailedPrecondition) as caught:
            client.explain(PICTURE, method="grad-cam")
        assert "spatial" in str(caught.value)
        gradients = {"gradient-shap", "input-x-gradient", "integrated-gradients", "smooth-grad"}
        controls = {"center-gaussian", "fake-cam", "random"}
        assert set(client.models()[0].methods) == {*gradients, *controls, "occlusion", "rise"}
        for method in client.methods("flat"):
            assert bool(method.unavailable) == (method.name not in client.models()[0].methods)
        assert "average pooling" in next(m for m in client.methods("flat") if m.name == "cam").unavailable
        assert client.explain(PICTURE, method="occlusion").saliency.shape == (8, 8)


def test_a_full_queue_says_when_to_come_back() -> None:
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=1)
    config = Config(listen="127.0.0.1:0", models=[tiny], max_rows_owed=900)
    with (
        serving(config) as server,
        camserve.Client(server.address, timeout=300) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        stream = client.explain_stream(PICTURE, method="opti-cam", parameters={"steps": 5000})
        next(stream)
        # Without the client's channel, which would wait and try again.
        with pytest.raises(grpc.RpcError) as caught:
            ExplainServiceStub(channel).Explain(
                request_messages.explain(PICTURE, method="opti-cam", parameters={"steps": 500}).request
            )
        refused = errors.from_rpc(caught.value, address=server.address, timeout_s=None)
        assert isinstance(refused, camserve.ResourceExhausted)
        assert refused.reason == "QUEUE_FULL"
        assert refused.retry_after_s is not None
        assert refused.retry_after_s > 0
        # At once: a picture that nobody will explain is not even looked at.
        hopeless = request_messages.explain(b"no picture", method="opti-cam", parameters={"steps": 500}).request
        with pytest.raises(grpc.RpcError) as caught:
            ExplainServiceStub(channel).Explain(hopeless)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        stream.close()
