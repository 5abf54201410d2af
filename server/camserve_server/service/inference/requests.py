"""Requests of the Open Inference Protocol → requests of ExplainService."""

from __future__ import annotations

import asyncio
import math
import struct
import time
from collections.abc import Mapping

import numpy as np

from camserve.v1 import explain_pb2 as explain
from camserve_server.errors import CamserveError, InvalidArgument, OutOfRange
from camserve_server.open_inference import inference_pb2 as pb
from camserve_server.service import bounds
from camserve_server.service.call import Context, cancellation, deadline
from camserve_server.service.codec import CodecThreads

VERSION = "1"  # of each model; a reload replaces a model and keeps its version
DEFAULT_METHOD = "poly-cam"  # as in the Python client
OUTPUTS = ("saliency", "target", "probability", "scores")
MAX_INT32 = 2**31 - 1
MAX_DIGITS = 20  # Python refuses to convert some thousands of them
# Start of names that Triton reserves. perf_analyzer sends one about streams with each request.
_RESERVED = "triton_"
_PART = 1 << 16  # values that are converted without releasing the interpreter

Tensor = pb.ModelInferRequest.InferInputTensor
Value = bool | int | float | str


async def converted_request(
    request: pb.ModelInferRequest, context: Context, codec: CodecThreads
) -> explain.ExplainRequest:
    """Convert a request of ModelInfer. Call it in the task of the call.

    The call is refused where those of Explain are, so that it is logged, counted and traced like them. This includes
    calls that are cancelled meanwhile.

    Args:
        request: The message of the caller.
        context: The context of the call.
        codec: Converts typed contents, which takes milliseconds.

    Returns:
        The request of Explain. If the request is wrong or the call is cancelled, only its identifier and its model:
        `bounds.check` then raises the error.
    """
    started, expires = time.monotonic(), deadline(context)
    refused = explain.ExplainRequest(request_id=request.id, model=request.model_name)
    if bounds.refusal() is not None:
        return refused
    try:
        if any(each.HasField("contents") for each in request.inputs):
            return await codec.run(explain_request, request)
        return explain_request(request)
    except CamserveError as error:
        bounds.refuse(error)
    except asyncio.CancelledError:
        bounds.refuse(cancellation(started, expires))
    return refused


def explain_request(request: pb.ModelInferRequest) -> explain.ExplainRequest:
    """Convert a request of ModelInfer.

    Its tensor "image" is the image, and its parameters are the other fields of the request. A parameter with another
    name is one of the method, unless its name begins with "triton_". This function checks what ExplainRequest cannot
    express. The checks of Explain follow.

    Args:
        request: The message of the caller.

    Raises:
        InvalidArgument: The request has another tensor than "image", or a parameter or an output that does not exist;
            the error names the field.
    """
    if request.model_version not in ("", VERSION):
        raise InvalidArgument(
            f"the model version is {request.model_version!r}; each model has only the version {VERSION!r}; omit it",
            field="model_version",
        )
    for i, output in enumerate(request.outputs):
        if output.name not in OUTPUTS:
            raise InvalidArgument(
                f"there is no output {output.name!r}; the outputs are {', '.join(OUTPUTS)}", field=f"outputs[{i}].name"
            )
        _refuse_parameters(output.parameters, f"outputs[{i}].parameters")
    explained = explain.ExplainRequest(request_id=request.id, model=request.model_name)
    _set_parameters(explained, request.parameters)
    _set_image(explained.image, request)
    return explained


# ---- parameters ------------------------------------------------------------------------------------------------------


def _set_parameters(explained: explain.ExplainRequest, parameters: Mapping[str, pb.InferParameter]) -> None:
    method = explained.method
    method.name = DEFAULT_METHOD
    given = {name: each for name, each in parameters.items() if not name.startswith(_RESERVED)}
    for name, parameter in sorted(given.items()):
        field = f"parameters[{name}]"
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidArgument(f"the parameter {name!r} has no value", field=field)
        value: Value = getattr(parameter, kind)
        match name:
            case "method":
                method.name = _text(value, field)
            case "layers":
                method.layers.extend(_list(value, field))
            case "seed":
                method.seed = _integer(value, field, 2**64 - 1)
            case "targets":
                explained.targets.extend(_targets(value, field))
            case "target_top_k":
                explained.target_top_k = _integer(value, field, MAX_INT32)
            case "metrics":
                explained.metrics.extend(explain.MetricSpec(name=each) for each in _list(value, field))
            case "budget":
                explained.budget = _integer(value, field, 2**63 - 1)
            case "precision":
                explained.precision = _text(value, field)
            case "priority":
                explained.priority = _text(value, field)
            case _:
                method.parameters.update({name.removeprefix("method."): value})


def _targets(value: Value, field: str) -> list[explain.Target]:
    """Return the targets of an integer, or of a text of indices and labels separated by commas."""
    if not isinstance(value, str):
        return [explain.Target(index=_integer(value, field, MAX_INT32))]
    return [
        explain.Target(index=_integer(int(each), field, MAX_INT32))
        if each.isascii() and each.isdigit() and len(each) <= MAX_DIGITS
        else explain.Target(label=each)
        for each in _list(value, field)
    ]


def _text(value: Value, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"{field} is {value}; expected a string", field=field)
    return value


def _list(value: Value, field: str) -> list[str]:
    return [part for each in _text(value, field).split(",") if (part := each.strip())]


def _integer(value: Value, field: str, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgument(f"{field} is {value!r}; expected an integer", field=field)
    if not 0 <= value <= most:
        raise OutOfRange(f"{field} is {value}; expected 0 to {most}", field=field)
    return value


def _refuse_parameters(parameters: Mapping[str, pb.InferParameter], field: str) -> None:
    if parameters:
        raise InvalidArgument(
            f"the tensor has the parameters {', '.join(sorted(parameters))}; camserve supports none, and no shared "
            "memory; omit them",
            field=field,
        )


# ---- the image -------------------------------------------------------------------------------------------------------


def _set_image(image: explain.Image, request: pb.ModelInferRequest) -> None:
    if len(request.inputs) != 1 or request.inputs[0].name != "image":
        names = ", ".join(each.name for each in request.inputs) or "none"
        raise InvalidArgument(f"the inputs are {names}; expected one tensor, image", field="inputs")
    tensor, raw = request.inputs[0], request.raw_input_contents
    _refuse_parameters(tensor.parameters, "inputs[0].parameters")
    if len(raw) > 1 or (raw and tensor.HasField("contents")):
        raise InvalidArgument(
            "the image has several contents; send either one entry of raw_input_contents or contents",
            field="raw_input_contents",
        )
    match tensor.datatype:
        case "BYTES":
            image.encoded = _file(tensor, raw[0] if raw else None)
        case "UINT8":
            height, width, channels = _one(tensor, 3, "[1, height, width, 3] or [height, width, 3]")
            if channels != 3:
                raise InvalidArgument(
                    f"the image has the shape {[*tensor.shape]}; pixels have the shape [1, height, width, 3] or "
                    "[height, width, 3]",
                    field="inputs[0].shape",
                    reason="WRONG_SHAPE",
                )
            image.pixels.height, image.pixels.width = height, width
            image.pixels.data = raw[0] if raw else _pixels(tensor)
        case "FP32":
            image.tensor.shape.extend(_one(tensor, 3, "[1, channels, height, width] or [channels, height, width]"))
            image.tensor.data = raw[0] if raw else _floats(tensor)
        case _:
            raise InvalidArgument(
                f"the image has the datatype {tensor.datatype!r}; expected UINT8 (pixels), FP32 (a preprocessed "
                "tensor) or BYTES (a file)",
                field="inputs[0].datatype",
            )


def _one(tensor: Tensor, dimensions: int, expected: str) -> list[int]:
    """Return the shape of the image without its batch. Raises InvalidArgument unless it is one image."""
    shape = [*tensor.shape]
    if len(shape) == dimensions + 1 and shape[0] > 1:
        raise InvalidArgument(
            f"the batch has {shape[0]} images; send one request for each, because the server makes batches of the rows "
            "of all requests",
            field="inputs[0].shape",
            reason="WRONG_SHAPE",
        )
    if len(shape) == dimensions + 1 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != dimensions or not all(1 <= size <= MAX_INT32 for size in shape):
        raise InvalidArgument(
            f"the image has the shape {[*tensor.shape]}; expected {expected}",
            field="inputs[0].shape",
            reason="WRONG_SHAPE",
        )
    return shape


def _file(tensor: Tensor, raw: bytes | None) -> bytes:
    """Return the only element of a tensor of type BYTES. In raw contents, its length precedes it in four bytes."""
    if math.prod(tensor.shape) != 1:
        raise InvalidArgument(
            f"the image has the shape {[*tensor.shape]}; expected [1], one file",
            field="inputs[0].shape",
            reason="WRONG_SHAPE",
        )
    if raw is None:
        files = tensor.contents.bytes_contents
        if len(files) != 1:
            raise InvalidArgument(
                f"the image has {len(files)} elements in bytes_contents; expected one, the file",
                field="inputs[0].contents",
            )
        return files[0]
    if len(raw) < 4 or struct.unpack("<I", raw[:4])[0] != len(raw) - 4:
        raise InvalidArgument(
            "the raw contents of the image are not one element of type BYTES: four bytes with its length, "
            "little-endian, and the file",
            field="raw_input_contents",
        )
    return raw[4:]


def _pixels(tensor: Tensor) -> bytes:
    values = tensor.contents.uint_contents
    try:
        return b"".join(bytes(values[i : i + _PART]) for i in range(0, len(values), _PART))
    except ValueError as error:
        raise OutOfRange("a pixel has a value above 255; expected 0 to 255", field="inputs[0].contents") from error


def _floats(tensor: Tensor) -> bytes:
    values = tensor.contents.fp32_contents
    return b"".join(np.array(values[i : i + _PART], "<f4").tobytes() for i in range(0, len(values), _PART))
