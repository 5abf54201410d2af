"""The Open Inference Protocol of the server, with and without front ends, and through tritonclient."""

from __future__ import annotations

import json
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from camserve.v1 import explain_pb2 as explain
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server.config import Config, TokenConfig
from camserve_server.open_inference import SERVICE
from camserve_server.open_inference import inference_pb2 as pb
from camserve_server.open_inference.inference_pb2_grpc import GRPCInferenceServiceStub
from camserve_server.service import tracer
from camserve_server.service.inference import requests
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.credentials import hashed
from tests.processes import completed
from tests.server.service.frontends.test_calls import LIMITS, bearer, sample, wait_until
from tests.server.service.test_errors import IMAGE, TIMEOUT_S, method, metric, png, request, tensor
from tests.support import stopped

TENSOR = np.linspace(-1, 1, 3 * 32 * 32, dtype=np.float32).reshape(3, 32, 32)
CALLS = Path(__file__).parents[2] / "inference_servers" / "triton_calls.py"


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one process", "front ends"])
def running(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving(Config(**LIMITS, frontends=request.param)) as server:
        yield server


@pytest.fixture(scope="module")
def channel(running: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> Any:
    return GRPCInferenceServiceStub(channel)


def infer(
    values: np.ndarray[Any, Any] | bytes = IMAGE[None],
    outputs: tuple[str, ...] = (),
    parameters: Mapping[str, Any] | None = None,
    **simple: Any,
) -> pb.ModelInferRequest:
    """Return a request for the tiny model with raw contents; bytes are an encoded file."""
    if isinstance(values, bytes):
        datatype, shape, raw = "BYTES", [1], struct.pack("<I", len(values)) + values
    else:
        datatype, shape = {"uint8": "UINT8", "float32": "FP32"}[values.dtype.name], [*values.shape]
        raw = values.tobytes()
    message = pb.ModelInferRequest(model_name="tiny", raw_input_contents=[raw])
    message.inputs.add(name="image", datatype=datatype, shape=shape)
    for name in outputs:
        message.outputs.add(name=name)
    for name, value in {**(parameters or {}), **simple}.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(message.parameters[name], kind, value)
    return message


def arrays(response: pb.ModelInferResponse) -> dict[str, np.ndarray[Any, Any]]:
    types = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8"}
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {each.name: np.frombuffer(raw, types[each.datatype]).reshape(each.shape) for each, raw in pairs}


def assert_same(response: pb.ModelInferResponse, explained: explain.ExplainResponse) -> None:
    """Assert that both responses contain the same maps, targets and scores, bit for bit."""
    found = arrays(response)
    assert b"".join(each.saliency.data for each in explained.maps) == found["saliency"].tobytes()
    assert found["saliency"].shape == (len(explained.maps), *explained.maps[0].saliency.shape)
    assert found["target"].tolist() == [each.target.index for each in explained.maps]
    assert found["probability"].tolist() == [each.target.probability for each in explained.maps]
    assert found["scores"].tolist() == [[score.value for score in each.scores] for each in explained.maps]


# ---- responses -------------------------------------------------------------------------------------------------------

SEEDED = method("rise", masks=8, keep=0.25)
SEEDED.seed = 7
CASES: dict[str, tuple[pb.ModelInferRequest, dict[str, Any]]] = {
    # name: request, the fields of the same request to Explain
    "pixels": (infer(), {"method": method("poly-cam")}),
    "pixels without a batch": (infer(IMAGE, method="grad-cam"), {}),
    "a preprocessed tensor": (infer(TENSOR[None], method="grad-cam"), {"image": explain.Image(tensor=tensor(TENSOR))}),
    "a file": (infer(png(IMAGE), method="grad-cam"), {"image": explain.Image(encoded=png(IMAGE))}),
    "parameters of the method": (
        infer(parameters={"method": "rise", "masks": 8, "method.keep": 0.25, "seed": 7}),
        {"method": SEEDED},
    ),
    "targets and metrics": (
        infer(method="grad-cam", targets="2, 1", metrics="insertion,average-drop"),
        {
            "targets": [explain.Target(index=2), explain.Target(index=1)],
            "metrics": [metric("insertion"), metric("average-drop")],
        },
    ),
    "one target": (infer(method="grad-cam", targets=3), {"targets": [explain.Target(index=3)]}),
    "the most probable targets": (infer(method="grad-cam", target_top_k=2), {"target_top_k": 2}),
    "layers, precision and priority": (
        infer(method="grad-cam", layers="c2", precision="fp32", priority="low"),
        {"method": method("grad-cam", ("c2",))},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_maps_are_those_of_explain(channel: grpc.Channel, stub: Any, name: str) -> None:
    message, fields = CASES[name]
    response = stub.ModelInfer(message, timeout=TIMEOUT_S)
    assert_same(response, ExplainServiceStub(channel).Explain(request(**fields), timeout=TIMEOUT_S))


def test_response_names_model_method_metrics_and_request(stub: Any) -> None:
    message = infer(bytes(png(np.full_like(IMAGE, 7))), method="grad-cam", metrics="insertion")
    message.id = "mine"
    response = stub.ModelInfer(message, timeout=TIMEOUT_S)
    assert (response.model_name, response.model_version, response.id) == ("tiny", "1", "mine")
    parameters = response.parameters
    assert parameters["method"].string_param == "grad-cam"
    assert parameters["metrics"].string_param == "insertion"
    assert parameters["share"].double_param == 1
    assert "nearly constant image" in parameters["warnings"].string_param


def test_parameters_that_triton_reserves_change_nothing(stub: Any) -> None:
    """perf_analyzer sends the first one with each request."""
    reserved: dict[str, Any] = {"triton_enable_empty_final_response": True, "triton_other": 1}
    with_them = stub.ModelInfer(infer(method="grad-cam", **reserved), timeout=TIMEOUT_S)
    without = stub.ModelInfer(infer(method="grad-cam"), timeout=TIMEOUT_S)
    assert with_them.raw_output_contents == without.raw_output_contents


def test_budget_stops_a_method_early(stub: Any) -> None:
    response = stub.ModelInfer(infer(method="rise", masks=64, budget=20), timeout=TIMEOUT_S)
    assert 0 < response.parameters["share"].double_param < 1


def test_response_has_the_requested_outputs_in_their_order(stub: Any) -> None:
    response = stub.ModelInfer(infer(method="grad-cam", outputs=("target", "saliency")), timeout=TIMEOUT_S)
    assert [*arrays(response)] == ["target", "saliency"]


def typed(datatype: str, shape: list[int], **contents: Any) -> pb.ModelInferRequest:
    message = infer(method="grad-cam")
    del message.raw_input_contents[:]
    message.inputs[0].datatype, message.inputs[0].shape[:] = datatype, shape
    message.inputs[0].contents.CopyFrom(pb.InferTensorContents(**contents))
    return message


@pytest.mark.parametrize(
    ("message", "same"),
    [
        (typed("UINT8", [1, 40, 30, 3], uint_contents=IMAGE.ravel().tolist()), infer(method="grad-cam")),
        (typed("FP32", [3, 32, 32], fp32_contents=TENSOR.ravel().tolist()), infer(TENSOR, method="grad-cam")),
        (typed("BYTES", [1, 1], bytes_contents=[png(IMAGE)]), infer(png(IMAGE), method="grad-cam")),
    ],
    ids=["pixels", "tensor", "file"],
)
def test_typed_contents_equal_raw_contents(
    stub: Any, message: pb.ModelInferRequest, same: pb.ModelInferRequest
) -> None:
    one, other = (stub.ModelInfer(each, timeout=TIMEOUT_S) for each in (message, same))
    assert one.raw_output_contents == other.raw_output_contents


def test_larger_pixels_than_the_limit_of_other_fields_are_accepted(stub: Any) -> None:
    values = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    message = typed("UINT8", [300, 300, 3], uint_contents=values.ravel().tolist())
    assert message.ByteSize() > 64 << 10
    one, other = (stub.ModelInfer(each, timeout=TIMEOUT_S) for each in (message, infer(values, method="grad-cam")))
    assert one.raw_output_contents == other.raw_output_contents


# ---- descriptions ----------------------------------------------------------------------------------------------------


def test_server_and_models_are_described(stub: Any) -> None:
    assert stub.ServerLive(pb.ServerLiveRequest(), timeout=TIMEOUT_S).live
    assert stub.ServerReady(pb.ServerReadyRequest(), timeout=TIMEOUT_S).ready
    assert stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=TIMEOUT_S).name == "camserve"
    ready = [
        stub.ModelReady(pb.ModelReadyRequest(name=name, version=version), timeout=TIMEOUT_S).ready
        for name, version in (("tiny", ""), ("tiny", "1"), ("tiny", "2"), ("huge", ""))
    ]
    assert ready == [True, True, False, False]
    found = stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"), timeout=TIMEOUT_S)
    assert (found.name, found.versions, found.platform) == ("tiny", ["1"], "camserve")
    assert [(each.name, each.datatype, [*each.shape]) for each in (*found.inputs, *found.outputs)] == [
        ("image", "UINT8", [1, -1, -1, 3]),
        ("saliency", "FP32", [-1, 32, 32]),
        ("target", "INT64", [-1]),
        ("probability", "FP64", [-1]),
        ("scores", "FP64", [-1, -1]),
    ]


def test_health_and_reflection_name_the_service(channel: grpc.Channel) -> None:
    check = health_pb2_grpc.HealthStub(channel).Check
    answer = check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, file = reflect(iter(questions), timeout=TIMEOUT_S)
    assert SERVICE in {each.name for each in listed.list_services_response.service}
    assert file.file_descriptor_response.file_descriptor_proto


# ---- errors ----------------------------------------------------------------------------------------------------------


def refusal(call: Callable[..., Any], message: Any, **options: Any) -> tuple[str, str, str, str]:
    """Return the status code, the field, the reason and the message of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call(message, timeout=TIMEOUT_S, **options)
    error: Any = caught.value
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    return error.code().name, info.metadata.get("field", ""), info.reason, error.details()


def changed(change: Callable[[pb.ModelInferRequest], object], **parameters: Any) -> pb.ModelInferRequest:
    message = infer(**parameters)
    change(message)
    return message


WRONG: dict[str, tuple[pb.ModelInferRequest, str, str, str]] = {
    # name: request, status code, field of the error, part of the message
    "an unknown parameter": (infer(method="rise", mask=8), "INVALID_ARGUMENT", "method.parameters.mask", "mask"),
    "an unknown method": (infer(method="none"), "NOT_FOUND", "method.name", "none"),
    "an unknown metric": (infer(metrics="none"), "NOT_FOUND", "metrics[0].name", "none"),
    "an unknown model": (changed(lambda m: setattr(m, "model_name", "huge")), "NOT_FOUND", "model", "tiny"),
    "an unknown version": (
        changed(lambda m: setattr(m, "model_version", "7")),
        "INVALID_ARGUMENT",
        "model_version",
        "only the version '1'",
    ),
    "an unknown output": (infer(outputs=("logits",)), "INVALID_ARGUMENT", "outputs[0].name", "saliency, target"),
    "an unknown target": (infer(targets=99), "INVALID_ARGUMENT", "targets[0].index", "99"),
    "a target that is too large": (infer(targets=2**40), "INVALID_ARGUMENT", "parameters[targets]", "expected 0 to"),
    "a target that is not an integer": (infer(targets=1.5), "INVALID_ARGUMENT", "parameters[targets]", "an integer"),
    "a method that is not a string": (infer(method=3), "INVALID_ARGUMENT", "parameters[method]", "a string"),
    "a parameter without a value": (
        changed(lambda m: m.parameters["seed"].Clear()),
        "INVALID_ARGUMENT",
        "parameters[seed]",
        "no value",
    ),
    "a batch of two images": (infer(np.stack([IMAGE, IMAGE])), "INVALID_ARGUMENT", "inputs[0].shape", "2 images"),
    "pixels with four channels": (
        infer(np.zeros((8, 8, 4), np.uint8)),
        "INVALID_ARGUMENT",
        "inputs[0].shape",
        "[height, width, 3]",
    ),
    "pixels that do not match their shape": (
        changed(lambda m: m.raw_input_contents.__setitem__(0, b"1234")),
        "INVALID_ARGUMENT",
        "image.pixels.data",
        "4 bytes",
    ),
    "a tensor of another size": (infer(TENSOR[:, 1:]), "INVALID_ARGUMENT", "image.tensor.shape", "[3, 32, 32]"),
    "a tensor with a huge dimension": (
        changed(lambda m: m.inputs[0].shape.__setitem__(1, 2**40)),
        "INVALID_ARGUMENT",
        "inputs[0].shape",
        "expected [1, height",
    ),
    "a file with a wrong length": (
        changed(lambda m: m.raw_input_contents.__setitem__(0, b"text"), values=b"text"),
        "INVALID_ARGUMENT",
        "raw_input_contents",
        "four bytes",
    ),
    "bytes that are not an image": (infer(b"text"), "INVALID_ARGUMENT", "image.encoded", "image"),
    "an unknown datatype": (
        changed(lambda m: setattr(m.inputs[0], "datatype", "FP16")),
        "INVALID_ARGUMENT",
        "inputs[0].datatype",
        "FP16",
    ),
    "another input": (changed(lambda m: setattr(m.inputs[0], "name", "x")), "INVALID_ARGUMENT", "inputs", "image"),
    "no input": (changed(lambda m: m.ClearField("inputs")), "INVALID_ARGUMENT", "inputs", "none"),
    "shared memory": (
        changed(lambda m: setattr(m.inputs[0].parameters["shared_memory_region"], "string_param", "r")),
        "INVALID_ARGUMENT",
        "inputs[0].parameters",
        "shared_memory_region",
    ),
    "contents twice": (
        changed(lambda m: m.inputs[0].contents.uint_contents.append(1)),
        "INVALID_ARGUMENT",
        "raw_input_contents",
        "several contents",
    ),
    "a pixel above 255": (
        typed("UINT8", [1, 1, 3], uint_contents=[1, 2, 256]),
        "INVALID_ARGUMENT",
        "inputs[0].contents",
        "0 to 255",
    ),
    "too many other bytes": (infer(method="x" * 70_000), "RESOURCE_EXHAUSTED", "parameters", "65536 bytes"),
    "too many single values": (
        typed("FP32", [3, 450, 450], fp32_contents=[0.5] * (3 * 450 * 450)),
        "RESOURCE_EXHAUSTED",
        "inputs.contents.fp32_contents",
        "raw_input_contents",
    ),
    "too long an identifier": (changed(lambda m: setattr(m, "id", "x" * 129)), "INVALID_ARGUMENT", "request_id", "129"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_refused(running: Server, stub: Any, name: str) -> None:
    message, code, field, text = WRONG[name]
    before = sample(running, f'code="{code}"')
    found = refusal(stub.ModelInfer, message)
    assert found[:2] == (code, field), found
    assert text in found[3]
    assert sample(running, f'code="{code}"') == before + 1


def test_descriptions_of_an_unknown_model_are_refused(stub: Any) -> None:
    for call, message in (
        (stub.ModelMetadata, pb.ModelMetadataRequest(name="huge")),
        (stub.ModelConfig, pb.ModelConfigRequest(name="huge")),
    ):
        assert refusal(call, message)[:3] == ("NOT_FOUND", "model", "UNKNOWN_NAME")


def test_calls_are_counted_under_their_name(running: Server, stub: Any) -> None:
    labels = 'code="OK",method="grad-cam",rpc="ModelInfer"'
    before = sample(running, labels)
    stub.ModelInfer(infer(method="grad-cam"), timeout=TIMEOUT_S)
    assert sample(running, labels) == before + 1


def test_spans_of_calls_name_the_service() -> None:
    assert {tracer.SERVICES[rpc] for rpc in ("ModelInfer", "ModelMetadata", "ModelConfig")} == {SERVICE}


def test_cancellation_reaches_the_engine(running: Server, stub: Any) -> None:
    before = sample(running, 'code="CANCELLED"')
    with stopped(running.engine):
        call = stub.ModelInfer.future(infer(method="rise", masks=2_000), timeout=TIMEOUT_S)
        wait_until(lambda: running.engine.rows_owed() > 0)
        call.cancel()
        wait_until(lambda: sample(running, 'code="CANCELLED"') > before)
    wait_until(lambda: running.engine.rows_owed() == 0)


def test_call_that_is_cancelled_while_it_is_converted_is_counted_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, resumed = threading.Event(), threading.Event()

    def held(message: pb.ModelInferRequest) -> explain.ExplainRequest:
        begun.set()
        resumed.wait(TIMEOUT_S)
        return explain.ExplainRequest()

    monkeypatch.setattr(requests, "explain_request", held)
    message = typed("FP32", [3, 32, 32], fp32_contents=TENSOR.ravel().tolist())
    message.id = "cancelled early"
    labels = 'code="CANCELLED",method="",rpc="ModelInfer"'
    with (
        structlog.testing.capture_logs() as lines,
        serving(Config(**LIMITS)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = GRPCInferenceServiceStub(channel).ModelInfer.future(message, timeout=TIMEOUT_S)
        assert begun.wait(TIMEOUT_S)
        call.cancel()
        wait_until(lambda: sample(server, labels) == 1)
        resumed.set()
        monkeypatch.undo()
        inferred = GRPCInferenceServiceStub(channel).ModelInfer(infer(method="grad-cam"), timeout=TIMEOUT_S)
        assert inferred.model_name == "tiny", "the server goes on"
        [line] = [each for each in lines if each.get("request_id") == "cancelled early"]
        assert (line["event"], line["rpc"], line["code"]) == ("call", "ModelInfer", "CANCELLED")
        assert sample(server, 'code="INTERNAL"') == 0
        assert server.engine.rows_owed() == 0


def test_full_queue_is_refused_with_a_retry_delay(running: Server, stub: Any) -> None:
    with stopped(running.engine):
        waiting = stub.ModelInfer.future(infer(method="rise", masks=4_500), timeout=TIMEOUT_S)
        wait_until(lambda: running.engine.rows_owed() > 0)
        code, _, reason, _ = refusal(stub.ModelInfer, infer(method="rise", masks=4_500))
        assert (code, reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        waiting.cancel()
    wait_until(lambda: running.engine.rows_owed() == 0)


def test_deadline_is_that_of_the_call(running: Server, stub: Any) -> None:
    with stopped(running.engine), pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(infer(method="grad-cam"), timeout=0.5)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("frontends", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_tokens_and_rights_apply(frontends: int) -> None:
    tokens = [TokenConfig(name="late", sha256=hashed("b"), priority="low")]
    with (
        serving(Config(**LIMITS, tokens=tokens, frontends=frontends)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub: Any = GRPCInferenceServiceStub(channel)
        assert refusal(stub.ModelInfer, infer())[0] == "UNAUTHENTICATED"
        assert refusal(stub.ServerReady, pb.ServerReadyRequest())[0] == "UNAUTHENTICATED"
        found = refusal(stub.ModelInfer, infer(method="grad-cam", priority="high"), metadata=bearer("b"))
        assert found[:2] == ("PERMISSION_DENIED", "priority")
        assert stub.ModelInfer(infer(method="grad-cam"), metadata=bearer("b"), timeout=TIMEOUT_S).outputs


def test_configuration_can_disable_the_protocol() -> None:
    with (
        serving(Config(**LIMITS, open_inference=False)) as server,
        grpc.insecure_channel(server.address) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        GRPCInferenceServiceStub(channel).ModelInfer(infer(), timeout=TIMEOUT_S)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


# ---- tritonclient ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tritonclient(running: Server, channel: grpc.Channel, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(png(IMAGE))
    # A process of its own, because tritonclient registers the same messages as the server.
    ran = completed([sys.executable, str(CALLS), running.address, str(tmp_path)])
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    stub: Any = ExplainServiceStub(channel)

    seeded = method("rise", masks=8)
    seeded.seed = 3
    explained = stub.Explain(
        request(
            method=seeded,
            targets=[explain.Target(index=1), explain.Target(index=2)],
            metrics=[metric("insertion"), metric("average-drop")],
        ),
        timeout=TIMEOUT_S,
    )
    found = np.load(tmp_path / "all.npz")
    assert found["saliency"].tobytes() == b"".join(each.saliency.data for each in explained.maps)
    assert found["target"].tolist() == [1, 2]
    assert found["probability"].tolist() == [each.target.probability for each in explained.maps]
    assert found["scores"].tolist() == [[score.value for score in each.scores] for each in explained.maps]
    for name, image in (
        ("tensor", explain.Image(tensor=tensor(TENSOR))),
        ("file", explain.Image(encoded=png(IMAGE))),
    ):
        same = stub.Explain(request(image=image, method=method("poly-cam")), timeout=TIMEOUT_S)
        assert np.load(tmp_path / f"{name}.npy").tobytes() == same.maps[0].saliency.data

    assert (report["live"], report["ready"], report["model_ready"]) == (True, True, [True, False])
    assert report["server"]["name"] == "camserve"
    assert report["metadata"]["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": ["1", "-1", "-1", "3"]}]
    config = report["config"]["config"]
    assert config["input"] == [{"name": "image", "data_type": "TYPE_UINT8", "dims": ["1", "-1", "-1", "3"]}]
    assert [each["data_type"] for each in config["output"]] == ["TYPE_FP32", "TYPE_INT64", "TYPE_FP64", "TYPE_FP64"]
    assert report["response"]["metrics"] == {"string_param": "insertion,average-drop"}
    assert (report["id"], report["selected"], report["asynchronous"]) == ("mine", ["target"], 4)
    status, text = report["failure"]
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "mask" in text


# ---- other packages with the same messages ---------------------------------------------------------------------------

CLASH = """
import asyncio
from google.protobuf import descriptor_pb2, descriptor_pool

file = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package="inference")  # as in tritonclient
file.message_type.add(name="ServerLiveRequest")
descriptor_pool.Default().AddSerializedFile(file.SerializeToString())

from camserve_server.config import Config
from camserve_server.errors import ConfigError
from camserve_server.service.server import Server


async def main():
    Server(Config(open_inference=False))
    try:
        Server(Config())
    except ConfigError as error:
        print(error)


asyncio.run(main())
"""


@pytest.mark.slow  # imports the server
def test_server_works_beside_packages_with_the_same_messages() -> None:
    result = completed([sys.executable, "-c", CLASH])
    assert result.stdout.startswith("open_inference: another package of this process"), result.stderr
