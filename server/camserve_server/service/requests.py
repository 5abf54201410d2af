"""What is asked: protobuf → domain. Everything is checked here, before it costs anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
import PIL.Image
import torch
from google.protobuf.struct_pb2 import Struct, Value
from numpy.typing import NDArray
from torch import Tensor

from camserve.v1 import explain_pb2 as pb
from camserve_server import registry
from camserve_server.config import Config
from camserve_server.engine.admission import Priority
from camserve_server.engine.warmup import SIZES
from camserve_server.errors import InvalidArgument, OutOfRange, Unservable
from camserve_server.maps import boxes
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.pixels import check_size, decode, from_pixels
from camserve_server.models.servable import unsupported_reason
from camserve_server.plan import Box, Image, Truth
from camserve_server.request_plan import MethodCall, MetricCall, rows_needed

MAX_TARGETS = 64
MAX_METRICS = 64
MAX_LAYERS = 64
MAX_BOXES = 256
MAX_TOP_K = 1000
MAX_BATCH_SIZE = 1024


@dataclass(frozen=True, eq=False)
class Asked:
    """A request that is worth starting."""

    model: Model
    image: Image
    as_given: bool  # the image was a tensor, used as it is
    targets: tuple[int, ...] | int  # classes, or how many of the likeliest
    subject: MethodCall | Tensor
    metrics: tuple[MetricCall, ...]
    seed: int
    budget: int
    batch_sizes: Mapping[LaneKind, int]
    truth: Truth | None  # where all of the targets are
    priority: Priority | None  # what the caller may have at most, if there is none

    @property
    def call(self) -> MethodCall | None:
        """The method, unless a map was given."""
        return self.subject if isinstance(self.subject, MethodCall) else None

    @property
    def maps(self) -> int:
        """How many maps there will be."""
        return self.targets if isinstance(self.targets, int) else len(self.targets)


def explain_request(request: pb.ExplainRequest, model: Model, config: Config) -> Asked:
    """Raises a CamserveError that names the field at fault."""
    if not 0 <= request.top_k <= MAX_TOP_K:
        raise OutOfRange(f"top_k must lie in [0, {MAX_TOP_K}], not {request.top_k}", field="top_k")
    model = model.at(request.precision)
    return Asked(
        model,
        model.image(_image(request.image, model, config)),
        request.image.HasField("tensor"),
        _targets(request, model),
        _method(request.method, model),
        _metrics(request.metrics, request.method.seed, "method"),
        request.method.seed,
        _budget(request.budget),
        _batch_sizes(request.batch_sizes, model),
        _truth(request, model),
        priority(request.priority),
    )


def evaluate_request(request: pb.EvaluateRequest, model: Model, config: Config) -> Asked:
    """Raises a CamserveError that names the field at fault."""
    model = model.at(request.precision)
    subject: MethodCall | Tensor
    match request.WhichOneof("subject"):
        case "saliency":
            subject = _saliency(request.saliency)
        case "method":
            subject = _method(request.method, model)
        case _:
            raise InvalidArgument("give a saliency map, or the method that makes one", field="subject")
    if not request.metrics:
        raise InvalidArgument("name at least one metric", field="metrics")
    return Asked(
        model,
        model.image(_image(request.image, model, config)),
        request.image.HasField("tensor"),
        (_target(request.target, model, "target"),) if request.HasField("target") else 1,
        subject,
        _metrics(request.metrics, request.seed, request.WhichOneof("subject")),
        request.seed,
        _budget(request.budget),
        _batch_sizes(request.batch_sizes, model),
        _truth(request, model),
        priority(request.priority),
    )


def priority(name: str) -> Priority | None:
    """None where nothing is asked for. Raises InvalidArgument."""
    if not name:
        return None
    if name not in get_args(Priority):
        raise InvalidArgument(f"it is {', '.join(get_args(Priority))} or empty, not {name!r}", field="priority")
    return cast(Priority, name)


def rows_of_explain(request: pb.ExplainRequest, model: Model) -> int:
    """The most rows that the request can take; its image is not looked at. Raises as explain_request does."""
    model, targets = model.at(request.precision), _targets(request, model)
    metrics = _metrics(request.metrics, request.method.seed, "method")
    maps = targets if isinstance(targets, int) else len(targets)
    return _within(request.budget, rows_needed(model, _method(request.method, model), metrics, maps))


def rows_of_evaluate(request: pb.EvaluateRequest, model: Model) -> int:
    """The same of an evaluation."""
    model = model.at(request.precision)
    method = _method(request.method, model) if request.HasField("method") else None
    metrics = _metrics(request.metrics, request.seed, request.WhichOneof("subject") or "method")
    return _within(request.budget, rows_needed(model, method, metrics, 1))


def _within(budget: int, rows: int) -> int:
    return min(rows, budget) if budget > 0 else rows


def _at_most(limit: int, values: Sequence[object], field: str) -> None:
    if len(values) > limit:
        raise OutOfRange(f"at most {limit} are allowed, not {len(values)}", field=field)


def _image(image: pb.Image, model: Model, config: Config) -> Tensor:
    expected = [model.preprocessing.channels, *model.preprocessing.size]
    match image.WhichOneof("content"):
        case "encoded":
            picture = decode(image.encoded, max_pixels=config.max_image_pixels, field="image.encoded")
            return model.preprocessing(picture)
        case "pixels":
            pixels = image.pixels
            check_size(pixels.width, pixels.height, config.max_image_pixels, "image.pixels")
            if len(pixels.data) != 3 * pixels.height * pixels.width:
                raise InvalidArgument(
                    f"{len(pixels.data)} bytes are not {pixels.height}x{pixels.width} pixels of three bytes",
                    field="image.pixels.data",
                    reason="WRONG_SHAPE",
                )
            values = np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)
            return model.preprocessing(from_pixels(values))
        case "tensor":
            tensor = _tensor(image.tensor, "image.tensor")
            if list(tensor.shape) != expected:
                raise InvalidArgument(
                    f"{model.name} takes a tensor of {expected}, not {list(tensor.shape)}",
                    field="image.tensor.shape",
                    reason="WRONG_SHAPE",
                )
            return tensor
        case _:
            raise InvalidArgument("give the image as encoded bytes, pixels or a tensor", field="image")


def _saliency(message: pb.Tensor) -> Tensor:
    saliency = _tensor(message, "saliency")
    if saliency.ndim != 2:
        raise InvalidArgument(
            f"a saliency map is [H, W], not {list(saliency.shape)}", field="saliency.shape", reason="WRONG_SHAPE"
        )
    if saliency.numpy().min() < 0 or saliency.numpy().max() > 1:
        raise OutOfRange("a saliency map must lie in [0, 1]; scale it first", field="saliency.data")
    return saliency


def _tensor(message: pb.Tensor, field: str) -> Tensor:
    shape = tuple(message.shape)
    if not 1 <= len(shape) <= 3 or min(shape) < 1 or len(message.data) != 4 * math.prod(shape):
        raise InvalidArgument(
            f"{len(message.data)} bytes are not float32 values of shape {list(shape)}, one to three numbers ≥ 1",
            field=f"{field}.data",
            reason="WRONG_SHAPE",
        )
    values = np.frombuffer(message.data, "<f4").astype(np.float32).reshape(shape)
    if not np.isfinite(values).all():
        raise InvalidArgument("the values must be finite", field=f"{field}.data", reason="NOT_FINITE")
    return torch.from_numpy(values)


def _targets(request: pb.ExplainRequest, model: Model) -> tuple[int, ...] | int:
    _at_most(MAX_TARGETS, request.targets, "targets")
    most = min(MAX_TARGETS, model.classes)
    if not 0 <= request.target_top_k <= most:
        raise OutOfRange(f"target_top_k must lie in [0, {most}], not {request.target_top_k}", field="target_top_k")
    if request.target_top_k and request.targets:
        raise InvalidArgument("give either targets or target_top_k", field="target_top_k")
    if request.targets:
        return tuple(_target(target, model, f"targets[{i}]") for i, target in enumerate(request.targets))
    return request.target_top_k or 1


def _budget(rows: int) -> int:
    if rows < 0:
        raise OutOfRange(f"a budget is a number of rows, not {rows}", field="budget")
    return rows


def _batch_sizes(sizes: Mapping[str, int], model: Model) -> dict[LaneKind, int]:
    """Checked as the configuration's `batch_size` is, and no larger than this server would take by itself.

    All others wait while a batch runs. A receipt of this machine has no larger ones, and that of another machine gives
    other bits anyway; the answer's receipt says at which sizes it ran.
    """
    for lane, size in sizes.items():
        if lane not in get_args(LaneKind) or not 1 <= size <= MAX_BATCH_SIZE:
            lanes = ", ".join(get_args(LaneKind))
            raise OutOfRange(
                f"batch sizes are of the lanes {lanes} and lie in [1, {MAX_BATCH_SIZE}], not {lane}: {size}",
                field="batch_sizes",
            )
    most = max([SIZES[model.device.type][-1], *model.batch_sizes.values()])
    return {kind: min(sizes[kind], most) for kind in get_args(LaneKind) if kind in sizes}


def _target(target: pb.Target, model: Model, field: str) -> int:
    match target.WhichOneof("kind"):
        case "index":
            return model.find_class(target.index, f"{field}.index")
        case "label":
            return model.find_class(target.label, f"{field}.label")
        case _:
            raise InvalidArgument("give the target's index or its label", field=field)


def _method(spec: pb.MethodSpec, model: Model) -> MethodCall:
    if not spec.name:
        raise InvalidArgument("name a method", field="method.name")
    method = registry.get_method(spec.name, "method.name")
    parameters = method.check(_parameters(spec.parameters), "method.parameters")
    _at_most(MAX_LAYERS, spec.layers, "method.layers")
    if method.layers == "none" and spec.layers:
        raise InvalidArgument(f"{method.name} looks at no layers", field="method.layers")
    if method.layers == "one" and len(spec.layers) > 1:
        raise InvalidArgument(f"{method.name} looks at one layer, not {len(spec.layers)}", field="method.layers")
    if method.layers == "none":
        _servable(method, model)
        return MethodCall(method, parameters, (), spec.seed)
    if spec.layers:
        layers = model.find_layers(spec.layers, "method.layers")
        sizes = [layer.height * layer.width for layer in layers]
        if sizes != sorted(sizes, reverse=True):
            raise InvalidArgument("the layers must go from fine to coarse", field="method.layers")
        return MethodCall(method, parameters, layers, spec.seed)
    _servable(method, model)
    return MethodCall(method, parameters, model.default_layers(method.layers == "many"), spec.seed)


def _servable(method: registry.Method, model: Model) -> None:
    reason = unsupported_reason(method, model)
    if reason:
        raise Unservable(f"{model.name} cannot serve {method.name}: {reason}", field="method.name")


def _metrics(specs: Sequence[pb.MetricSpec], seed: int, subject: str | None) -> tuple[MetricCall, ...]:
    _at_most(MAX_METRICS, specs, "metrics")
    calls = []
    for i, spec in enumerate(specs):
        metric = registry.get_metric(spec.name, f"metrics[{i}].name")
        if metric.needs_explainer and subject != "method":
            raise InvalidArgument(
                f"{metric.name} makes maps of other images: give the method that makes them, not a map",
                field=f"metrics[{i}].name",
            )
        calls.append(MetricCall(metric, metric.check(_parameters(spec.parameters), f"metrics[{i}].parameters"), seed))
    return tuple(calls)


def _truth(request: pb.ExplainRequest | pb.EvaluateRequest, model: Model) -> Truth | None:
    """Where the target is, in the model's input; None where it was not said and no metric asks."""
    if not request.HasField("truth"):
        for spec in request.metrics:
            if registry.get_metric(spec.name, "metrics").needs_truth:
                raise InvalidArgument(
                    f"{spec.name} needs to know where the target is: give boxes or a mask", field="truth"
                )
        return None
    if not request.truth.boxes and not request.truth.HasField("mask"):
        raise InvalidArgument("give boxes or a mask", field="truth")
    _at_most(MAX_BOXES, request.truth.boxes, "truth.boxes")
    found = [_box(box, model, f"truth.boxes[{i}]") for i, box in enumerate(request.truth.boxes)]
    mask = _mask(request.truth.mask, model) if request.truth.HasField("mask") else None
    return boxes.make_truth(found, mask, model.preprocessing.size)


def _box(box: pb.Box, model: Model, field: str) -> Box:
    sides = (box.left, box.top, box.right, box.bottom)
    if not all(0 <= side <= 1 for side in sides):
        raise OutOfRange(f"the sides of a box lie in [0, 1] of the image's width or height, not {sides}", field=field)
    if box.left >= box.right or box.top >= box.bottom:
        raise InvalidArgument(f"a box has left < right and top < bottom, not {sides}", field=field)
    height, width = model.preprocessing.size
    return (box.left * width, box.top * height, box.right * width, box.bottom * height)


def _mask(message: pb.Tensor, model: Model) -> NDArray[np.bool_]:
    """[H, W] of the model's input; true where at least half of a pixel is."""
    values = _tensor(message, "truth.mask").numpy()
    if values.ndim != 2:
        raise InvalidArgument(
            f"a mask is [H, W], not {list(values.shape)}", field="truth.mask.shape", reason="WRONG_SHAPE"
        )
    if values.min() < 0 or values.max() > 1:
        raise OutOfRange("a mask must lie in [0, 1]: 1 where the target is, 0 elsewhere", field="truth.mask.data")
    height, width = model.preprocessing.size
    if values.shape != (height, width):  # by Pillow, because this runs beside the engine's thread: see device/
        values = np.asarray(PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.BILINEAR))
    mask: NDArray[np.bool_] = values >= 0.5
    if not mask.any():
        raise InvalidArgument("the mask is empty at the model's input size", field="truth.mask.data")
    return mask


def _parameters(struct: Struct) -> dict[str, object]:
    return {name: _plain(value) for name, value in struct.fields.items()}


def _plain(value: Value) -> object:
    """A number, string or boolean; None for anything else, which no parameter can be."""
    kind = value.WhichOneof("kind")
    return getattr(value, kind) if kind in ("number_value", "string_value", "bool_value") else None
