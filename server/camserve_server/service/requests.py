"""Check and convert request messages.

A request is parsed in two steps. `parse_explain` and `parse_evaluate` read every field but the pixels. This is cheap
and gives the rows that the request needs, so that the engine can refuse it. `decode_pixels` then decodes the image, and
the map or the mask if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

from google.protobuf.struct_pb2 import Struct, Value
from torch import Tensor

from camserve.v1 import explain_pb2 as pb
from camserve_server import registry
from camserve_server.config import Config
from camserve_server.engine.admission import Priority
from camserve_server.engine.warmup import SIZES
from camserve_server.errors import InvalidArgument, OutOfRange, Unservable
from camserve_server.maps import boxes
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.servable import unsupported_reason
from camserve_server.plan import Box, Image, Truth
from camserve_server.request_plan import MethodCall, MetricCall, RowsNeeded, rows_needed
from camserve_server.service import map_format
from camserve_server.service.decoding import (
    DataSizes,
    check_image,
    check_mask,
    check_saliency,
    decode_image,
    decode_mask,
    decode_saliency,
    digest,
)
from camserve_server.service.map_format import MapFormat

MAX_TARGETS = 64
MAX_METRICS = 64
MAX_LAYERS = 64
MAX_BOXES = 256
MAX_TOP_K = 1000
MAX_BATCH_SIZE = 1024


@dataclass(frozen=True, eq=False)
class ParsedRequest:
    """All checked fields of a request, and its pixels as they were sent.

    Attributes:
        model: The model at the requested precision.
        method: The method that makes the maps; None if the request brings a map.
        targets: Class indices, or the number of the most probable classes to explain.
        metrics: The metrics that score each map.
        rows: The rows that the request can take.
        seed: The seed of methods and metrics that use random numbers.
        budget: The most rows that the caller allows; 0 for no budget.
        batch_sizes: The requested batch sizes by kind of lane.
        priority: The requested priority; None if the request does not name one.
        image: The image as it was sent.
        boxes: Boxes around the target, in pixels of the model's input.
        mask: A mask of the target; None if there is none.
        map_format: The format of the maps in the response.
        saliency: The map to score; None if a method makes the maps.
        top_k: The number of predictions in the response; 0 for the default.
        raw: Also return the maps before resizing and scaling.
    """

    model: Model
    method: MethodCall | None
    targets: tuple[int, ...] | int
    metrics: tuple[MetricCall, ...]
    rows: RowsNeeded
    seed: int
    budget: int
    batch_sizes: Mapping[LaneKind, int]
    priority: Priority | None
    image: pb.Image
    boxes: tuple[Box, ...]
    mask: pb.Tensor | None
    map_format: MapFormat
    saliency: pb.Tensor | None = None
    top_k: int = 0
    raw: bool = False

    def on(self, model: Model) -> ParsedRequest:
        """Return the request for a copy of its model on another device, at the precision of the request."""
        return replace(self, model=model.at(self.model.precision))


@dataclass(frozen=True, eq=False)
class Pixels:
    """The decoded pixels of a request.

    Attributes:
        image: The preprocessed image on the model's device.
        input_digest: The digest of the preprocessed image, for the receipt.
        saliency: The map [h, w] in [0, 1] to score; None if a method makes the maps.
        truth: The location of the targets; None if the request does not contain it.
        warnings: Warnings about the image, for the reader of the maps.
    """

    image: Image
    input_digest: str
    saliency: Tensor | None
    truth: Truth | None
    warnings: tuple[str, ...] = ()


def parse_explain(
    request: pb.ExplainRequest, model: Model, config: Config, sizes: DataSizes | None = None
) -> ParsedRequest:
    """Check and convert all fields of a request but its pixels.

    Args:
        request: The message of the caller.
        model: The model that the request names.
        config: The configuration of the server.
        sizes: The sizes of the data if they have been removed from the message.

    Raises:
        CamserveError: A field is wrong; the error names the field.
    """
    sizes = sizes or DataSizes.of(request)
    if not 0 <= request.top_k <= MAX_TOP_K:
        raise OutOfRange(f"top_k is {request.top_k}; expected 0 to {MAX_TOP_K}", field="top_k")
    model = model.at(request.precision)
    targets = _targets(request, model)
    method = _method(request.method, model)
    seed = request.method.seed
    parsed = _parse_shared(
        request, config, sizes, model=model, method=method, targets=targets, seed=seed, metrics_seed=seed
    )
    return replace(parsed, top_k=request.top_k, raw=request.raw)


def parse_evaluate(
    request: pb.EvaluateRequest, model: Model, config: Config, sizes: DataSizes | None = None
) -> ParsedRequest:
    """Check and convert all fields of a request but its pixels.

    Args:
        request: The message of the caller.
        model: The model that the request names.
        config: The configuration of the server.
        sizes: The sizes of the data if they have been removed from the message.

    Raises:
        CamserveError: A field is wrong; the error names the field.
    """
    sizes = sizes or DataSizes.of(request)
    model = model.at(request.precision)
    method, saliency = None, None
    match request.WhichOneof("subject"):
        case "saliency":
            saliency = request.saliency
            check_saliency(saliency, sizes.saliency)
        case "method":
            method = _method(request.method, model)
        case _:
            raise InvalidArgument("the request has no map; send a saliency map or a method", field="subject")
    if not request.metrics:
        raise InvalidArgument("the request has no metric; name at least one", field="metrics")
    target = (_target(request.target, model, "target"),) if request.HasField("target") else 1
    seed = method.seed if method else request.seed
    parsed = _parse_shared(
        request, config, sizes, model=model, method=method, targets=target, seed=seed, metrics_seed=request.seed
    )
    return replace(parsed, saliency=saliency)


def decode_pixels(parsed: ParsedRequest, config: Config) -> Pixels:
    """Decode the image of a request, and its map or mask if there is one.

    Decoding a large image takes about a second, so it belongs on a thread beside the event loop.

    Args:
        parsed: The other fields of the request.
        config: The configuration of the server.

    Raises:
        CamserveError: The pixels cannot be read or have wrong values; the error names the field.
    """
    model = parsed.model
    values, warnings = decode_image(parsed.image, model.preprocessing, config.max_image_pixels)
    saliency = None if parsed.saliency is None else decode_saliency(parsed.saliency)
    truth = None
    if parsed.boxes or parsed.mask is not None:
        size = model.preprocessing.size
        mask = None if parsed.mask is None else decode_mask(parsed.mask, size)
        truth = boxes.make_truth([*parsed.boxes], mask, size)
    return Pixels(model.image(values), digest(values), saliency, truth, warnings)


def _parse_shared(
    request: pb.ExplainRequest | pb.EvaluateRequest,
    config: Config,
    sizes: DataSizes,
    *,
    model: Model,
    method: MethodCall | None,
    targets: tuple[int, ...] | int,
    seed: int,
    metrics_seed: int,
) -> ParsedRequest:
    """Check and convert the fields that both kinds of request have."""
    metrics = _metrics(request.metrics, metrics_seed, makes_maps=method is not None)
    check_image(request.image, sizes.image, model, config.max_image_pixels)
    target_boxes, mask = _truth(request, sizes.mask, model)
    return ParsedRequest(
        model=model,
        method=method,
        targets=targets,
        metrics=metrics,
        rows=rows_needed(model, method, metrics, targets if isinstance(targets, int) else len(targets)),
        seed=seed,
        budget=_budget(request.budget),
        batch_sizes=_batch_sizes(request.batch_sizes, model),
        priority=_priority(request.priority),
        image=request.image,
        boxes=target_boxes,
        mask=mask,
        map_format=map_format.parse(request.map_format, method),
    )


def _priority(name: str) -> Priority | None:
    if not name:
        return None
    if name not in get_args(Priority):
        raise InvalidArgument(
            f"the priority is {name!r}; expected {', '.join(get_args(Priority))} or empty", field="priority"
        )
    return cast(Priority, name)


def _check_count(limit: int, values: Sequence[object], field: str) -> None:
    if len(values) > limit:
        raise OutOfRange(f"{field} has {len(values)} entries; expected at most {limit}", field=field)


def _targets(request: pb.ExplainRequest, model: Model) -> tuple[int, ...] | int:
    _check_count(MAX_TARGETS, request.targets, "targets")
    most = min(MAX_TARGETS, model.classes)
    if not 0 <= request.target_top_k <= most:
        raise OutOfRange(f"target_top_k is {request.target_top_k}; expected 0 to {most}", field="target_top_k")
    if request.target_top_k and request.targets:
        raise InvalidArgument("the request has targets and target_top_k; send only one of them", field="target_top_k")
    if request.targets:
        return tuple(_target(target, model, f"targets[{i}]") for i, target in enumerate(request.targets))
    return request.target_top_k or 1


def _budget(rows: int) -> int:
    if rows < 0:
        raise OutOfRange(f"the budget is {rows}; expected a number of rows, or 0 for no budget", field="budget")
    return rows


def _batch_sizes(sizes: Mapping[str, int], model: Model) -> dict[LaneKind, int]:
    """Check batch sizes like the configuration's `batch_size`, and limit them to sizes that the server itself uses.

    All other requests wait while a batch runs. A receipt of this machine never has a larger size, and a receipt of
    another machine gives other bits in any case. The receipt of the response contains the sizes that were used.
    """
    for kind, size in sizes.items():
        if kind not in get_args(LaneKind) or not 1 <= size <= MAX_BATCH_SIZE:
            raise OutOfRange(
                f"the batch size of {kind} is {size}; expected 1 to {MAX_BATCH_SIZE} for the kinds of lane "
                f"{', '.join(get_args(LaneKind))}",
                field="batch_sizes",
            )
    most = 1 if model.one_row else max([SIZES[model.device.type][-1], *model.batch_sizes.values()])
    return {kind: min(sizes[kind], most) for kind in get_args(LaneKind) if kind in sizes}


def _target(target: pb.Target, model: Model, field: str) -> int:
    match target.WhichOneof("kind"):
        case "index":
            return model.find_class(target.index, f"{field}.index")
        case "label":
            return model.find_class(target.label, f"{field}.label")
        case _:
            raise InvalidArgument("the target is empty; send its index or its label", field=field)


def _method(spec: pb.MethodSpec, model: Model) -> MethodCall:
    if not spec.name:
        raise InvalidArgument("the request has no method; ListMethods lists their names", field="method.name")
    method = registry.get_method(spec.name, "method.name")
    parameters = method.check(_parameters(spec.parameters), "method.parameters")
    _check_count(MAX_LAYERS, spec.layers, "method.layers")
    if method.layers == "none" and spec.layers:
        raise InvalidArgument(
            f"the request names {len(spec.layers)} layers; {method.name} uses none; omit them", field="method.layers"
        )
    if method.layers == "one" and len(spec.layers) > 1:
        raise InvalidArgument(
            f"the request names {len(spec.layers)} layers; {method.name} uses one", field="method.layers"
        )
    if method.layers == "none":
        _check_servable(method, model)
        return MethodCall(method, parameters, (), spec.seed)
    if spec.layers:
        layers = model.find_layers(spec.layers, "method.layers")
        sizes = [layer.height * layer.width for layer in layers]
        if sizes != sorted(sizes, reverse=True):
            raise InvalidArgument(
                "the layers are not in the order from fine to coarse; sort them by descending size",
                field="method.layers",
            )
        return MethodCall(method, parameters, layers, spec.seed)
    _check_servable(method, model)
    return MethodCall(method, parameters, model.default_layers(method.layers == "many"), spec.seed)


def _check_servable(method: registry.Method, model: Model) -> None:
    reason = unsupported_reason(method, model)
    if reason:
        raise Unservable(f"{model.name} cannot serve {method.name}: {reason}", field="method.name")


def _metrics(specs: Sequence[pb.MetricSpec], seed: int, *, makes_maps: bool) -> tuple[MetricCall, ...]:
    _check_count(MAX_METRICS, specs, "metrics")
    calls = []
    for i, spec in enumerate(specs):
        metric = registry.get_metric(spec.name, f"metrics[{i}].name")
        if metric.needs_explainer and not makes_maps:
            raise InvalidArgument(
                f"{metric.name} makes maps of other images, but the request has a map and no method; send the method "
                "that made the map",
                field=f"metrics[{i}].name",
            )
        parameters = metric.check(_parameters(spec.parameters), f"metrics[{i}].parameters")
        calls.append(MetricCall(metric, parameters, seed))
    return tuple(calls)


def _truth(
    request: pb.ExplainRequest | pb.EvaluateRequest, mask_bytes: int, model: Model
) -> tuple[tuple[Box, ...], pb.Tensor | None]:
    """Return the boxes in pixels of the model's input and the mask; both are empty if no metric needs them."""
    if not request.HasField("truth"):
        for spec in request.metrics:
            if registry.get_metric(spec.name, "metrics").needs_truth:
                raise InvalidArgument(
                    f"{spec.name} needs the location of the target; send boxes or a mask", field="truth"
                )
        return (), None
    if not request.truth.boxes and not request.truth.HasField("mask"):
        raise InvalidArgument("truth is empty; send boxes or a mask", field="truth")
    _check_count(MAX_BOXES, request.truth.boxes, "truth.boxes")
    found = tuple(_box(box, model, f"truth.boxes[{i}]") for i, box in enumerate(request.truth.boxes))
    if not request.truth.HasField("mask"):
        return found, None
    check_mask(request.truth.mask, mask_bytes)
    return found, request.truth.mask


def _box(box: pb.Box, model: Model, field: str) -> Box:
    sides = (box.left, box.top, box.right, box.bottom)
    if not all(0 <= side <= 1 for side in sides):
        raise OutOfRange(
            f"the sides of the box are {sides}; expected [0, 1], as a part of the image's width or height", field=field
        )
    if box.left >= box.right or box.top >= box.bottom:
        raise InvalidArgument(f"the sides of the box are {sides}; expected left < right and top < bottom", field=field)
    height, width = model.preprocessing.size
    return (box.left * width, box.top * height, box.right * width, box.bottom * height)


def _parameters(struct: Struct) -> dict[str, object]:
    return {name: _plain(value) for name, value in struct.fields.items()}


def _plain(value: Value) -> object:
    """Return a number, a string or a boolean; None for any other value, which no parameter accepts."""
    kind = value.WhichOneof("kind")
    return getattr(value, kind) if kind in ("number_value", "string_value", "bool_value") else None
