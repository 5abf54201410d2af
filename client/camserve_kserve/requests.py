"""Requests of KServe's protocols → images and arguments of `camserve.aio.Client.explain`.

Names and meaning of parameters and tensors are those of the server's Open Inference Protocol (docs/open-inference.md).
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from kserve import InferRequest

from camserve.errors import InvalidArgument
from camserve.images import ImageLike

__all__ = ["FORMATS", "OUTPUTS", "ImageRequest", "of_instances", "of_tensors"]

OUTPUTS = ("saliency", "target", "probability", "scores")
FORMATS = ("list", "base64")
_MAX_INSTANCES = 1024
_INTEGERS = {"seed", "target_top_k", "budget"}
_TEXTS = {"method", "precision", "priority"}
# Parameters whose argument of `explain` has another name.
_ARGUMENTS = {"targets": "target", "target_top_k": "top_k"}


@dataclass(frozen=True)
class ImageRequest:
    """A request for the maps of one image.

    Attributes:
        image: The image.
        arguments: Further arguments of `Client.explain`.
        saliency_format: Format of maps in JSON, one of `FORMATS`.
    """

    image: ImageLike
    arguments: dict[str, Any]
    saliency_format: str = FORMATS[0]


def of_instances(body: object) -> list[ImageRequest]:
    """Convert a request of the v1 protocol.

    Args:
        body: The JSON object, or its bytes: `{"instances": [...], "parameters": {...}}`.

    Returns:
        One request for each instance.

    Raises:
        InvalidArgument: The object has another form; the error names the field.
    """
    if isinstance(body, bytes):
        try:
            body = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise InvalidArgument(f"the request is not JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("instances"), list) or not body["instances"]:
        raise InvalidArgument('expected a JSON object {"instances": [...]} with at least one image', field="instances")
    if (count := len(body["instances"])) > _MAX_INSTANCES:
        raise InvalidArgument(
            f"the request has {count} images; expected at most {_MAX_INSTANCES}; send several requests",
            field="instances",
        )
    _refuse_others(body, {"instances", "parameters"}, "the request", "")
    common = _mapping(body.get("parameters", {}), "parameters")
    return [_of_instance(each, common, f"instances[{i}]") for i, each in enumerate(body["instances"])]


def of_tensors(request: InferRequest) -> ImageRequest:
    """Convert a request of the v2 protocol, with the tensor "image".

    Args:
        request: The request of REST or gRPC.

    Raises:
        InvalidArgument: The request has another tensor or output, or a wrong parameter; the error names the field.
    """
    for i, output in enumerate(request.request_outputs or ()):
        if output.name not in OUTPUTS:
            raise InvalidArgument(
                f"there is no output {output.name!r}; the outputs are {', '.join(OUTPUTS)}", field=f"outputs[{i}].name"
            )
    if len(request.inputs) != 1 or request.inputs[0].name != "image":
        names = ", ".join(each.name for each in request.inputs) or "none"
        raise InvalidArgument(f"the inputs are {names}; expected one tensor, image", field="inputs")
    parameters = {
        name: _plain(value, name)
        for name, value in (request.parameters or {}).items()
        # The SDK reads the first one. Triton reserves the others; perf_analyzer sends one about streams.
        if name != "binary_data_output" and not name.startswith("triton_")
    }
    return ImageRequest(_tensor(request.inputs[0]), _arguments(parameters))


# ---- parameters ------------------------------------------------------------------------------------------------------


def _arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {"parameters": {}}
    for name, value in parameters.items():
        field = f"parameters[{name}]"
        if name in _INTEGERS:
            arguments[_ARGUMENTS.get(name, name)] = _integer(value, field)
        elif name in _TEXTS:
            arguments[name] = _text(value, field)
        elif name == "layers" or (name == "metrics" and not isinstance(value, dict)):
            arguments[name] = [_text(each, field) for each in _list(value, field)]
        elif name == "metrics":
            arguments[name] = {metric: _mapping(each, f"{field}.{metric}") for metric, each in value.items()}
        elif name == "targets":
            arguments[_ARGUMENTS[name]] = [_target(each, field) for each in _list(value, field)]
        else:
            arguments["parameters"][name.removeprefix("method.")] = value
    return arguments


def _plain(value: Any, name: str) -> Any:
    """Return the value of a parameter, which is a message in requests of gRPC."""
    if not hasattr(value, "WhichOneof"):
        return value
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidArgument(
            f"the parameter {name!r} has no value that the SDK of KServe can read; expected a string, an integer or a "
            "boolean; send decimal numbers with REST",
            field=f"parameters[{name}]",
        )
    return getattr(value, kind)


def _list(value: Any, field: str) -> Sequence[Any]:
    """Return the elements of a list, or of a text with commas. A number is a list of one element."""
    if isinstance(value, str):
        return [part for each in value.split(",") if (part := each.strip())]
    return value if isinstance(value, list) else [_integer(value, field)]


def _target(value: Any, field: str) -> int | str:
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) <= 20 else value
    return _integer(value, field)


def _integer(value: Any, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgument(f"{field} has the type {type(value).__name__}; expected an integer", field=field)
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"{field} has the type {type(value).__name__}; expected a string", field=field)
    return value


def _mapping(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{field} has the type {type(value).__name__}; expected a JSON object", field=field)
    return value


def _refuse_others(given: Mapping[str, Any], known: set[str], name: str, field: str) -> None:
    if others := sorted(given.keys() - known):
        raise InvalidArgument(
            f"{name} has the unknown keys {', '.join(others)}; expected {', '.join(sorted(known))}", field=field
        )


# ---- images ----------------------------------------------------------------------------------------------------------


def _of_instance(instance: Any, common: Mapping[str, Any], field: str) -> ImageRequest:
    parameters = dict(common)
    content = instance
    if isinstance(instance, dict):
        _refuse_others(instance, {"b64", "image", "parameters"}, field, field)
        parameters |= _mapping(instance.get("parameters", {}), f"{field}.parameters")
        if "image" in instance:
            content, field = instance["image"], f"{field}.image"
    saliency_format = parameters.pop("saliency_format", FORMATS[0])
    if saliency_format not in FORMATS:
        raise InvalidArgument(
            f"saliency_format is not one of {', '.join(FORMATS)}", field="parameters[saliency_format]"
        )
    return ImageRequest(_image(content, field), _arguments(parameters), saliency_format)


def _image(content: Any, field: str) -> ImageLike:
    if isinstance(content, dict) and "b64" in content:
        return _file(content["b64"], f"{field}.b64")
    if isinstance(content, list):
        return _array(content, field)
    raise InvalidArgument(
        f'{field} is no image; expected {{"b64": "..."}} with a file in base64, or a nested list: integers '
        "[height, width, 3] for pixels, or decimal numbers [channels, height, width] for a preprocessed tensor",
        field=field,
    )


def _file(text: Any, field: str) -> bytes:
    try:
        return base64.b64decode(_text(text, field), validate=True)
    except (binascii.Error, ValueError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"{field} is not valid base64: {error}", field=field) from error


def _array(rows: list[Any], field: str) -> np.ndarray[Any, Any]:
    """Return pixels of integers, or a tensor of decimal numbers."""
    try:
        # An array of texts would have the length of the longest one for each element.
        values = np.asarray(rows, object)
    except ValueError as error:
        raise InvalidArgument(f"the rows of {field} have different lengths", field=field) from error
    types = {*map(type, values.flat)}
    if list in types:
        raise InvalidArgument(f"the rows of {field} have different lengths", field=field)
    if not types <= {int, float}:
        raise InvalidArgument(f"{field} contains other values than numbers", field=field)
    if float in types:
        return values.astype(np.float32)
    if values.size and not 0 <= values.min() <= values.max() <= 255:
        raise InvalidArgument(
            f"{field} has integers from {values.min()} to {values.max()}; pixels are integers from 0 to 255. Write the "
            "values of a preprocessed tensor with a decimal point",
            field=field,
        )
    return values.astype(np.uint8)


def _tensor(tensor: Any) -> ImageLike:
    dimensions = {"UINT8": 3, "FP32": 3, "BYTES": 1}.get(tensor.datatype)
    if dimensions is None:
        raise InvalidArgument(
            f"the image has the datatype {tensor.datatype!r}; expected UINT8 (pixels), FP32 (a preprocessed tensor) or "
            "BYTES (a file)",
            field="inputs[0].datatype",
        )
    try:
        values = tensor.as_numpy()
    except (ValueError, TypeError, OverflowError, struct.error) as error:
        raise InvalidArgument(
            f"the data of the image does not match its datatype {tensor.datatype} and its shape {tensor.shape}",
            field="inputs[0].data",
        ) from error
    if values.ndim == dimensions + 1 and len(values) > 1:
        raise InvalidArgument(
            f"the batch has {len(values)} images; send one request for each, because the server makes batches of the "
            "rows of all requests",
            field="inputs[0].shape",
        )
    if values.ndim == dimensions + 1 and len(values) == 1:
        values = values[0]
    if values.ndim != dimensions or not values.size or (tensor.datatype == "BYTES" and values.size != 1):
        raise InvalidArgument(
            f"the image has the shape {tensor.shape}; expected [1, height, width, 3] for UINT8, "
            "[1, channels, height, width] for FP32, or [1] for BYTES",
            field="inputs[0].shape",
        )
    if tensor.datatype != "BYTES":
        image: np.ndarray[Any, Any] = values
        return image
    file = values[0]
    return file if isinstance(file, bytes) else _file(file, "inputs[0].data")
