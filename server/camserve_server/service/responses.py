"""Convert results to protobuf messages."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import metadata
from typing import Any
from weakref import WeakKeyDictionary

from google.protobuf.struct_pb2 import Struct, Value
from torch import Tensor

from camserve.v1 import explain_pb2 as pb
from camserve_server import registry
from camserve_server.config import ModelConfig
from camserve_server.engine.job import Job
from camserve_server.engine.lanes.openvino_forward import OpenVinoForward
from camserve_server.models.layers import Layer
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.servable import unsupported_reason
from camserve_server.plan import Level, Randomised
from camserve_server.request_plan import MethodCall, rows_needed
from camserve_server.request_result import LazyMaps, RequestResult, finish_maps
from camserve_server.service.decoding import digest
from camserve_server.service.map_format import ITEM_BYTES, MapFormat, native_maps, set_tensor, tensor
from camserve_server.service.requests import ParsedRequest

TOP_K = 5


def explain_response(
    request_id: str,
    parsed: ParsedRequest,
    input_digest: str,
    job: Job[RequestResult],
    result: RequestResult,
    further_warnings: Sequence[str],
) -> pb.ExplainResponse:
    """Return the response to Explain.

    Args:
        request_id: The identifier of the request.
        parsed: The fields of the request.
        input_digest: The digest of the preprocessed image.
        job: The finished job, which contains the cost.
        result: The result of the plan.
        further_warnings: Warnings about the image and of the engine; they are added to those of each map.
    """
    response = explain_outline(request_id, parsed, input_digest, job, result)
    add_maps(response.maps, response.receipt, result, parsed.map_format, further_warnings)
    return response


def explain_outline(
    request_id: str, parsed: ParsedRequest, input_digest: str, job: Job[RequestResult], result: RequestResult
) -> pb.ExplainResponse:
    """Return the response to Explain without what `add_maps` adds."""
    response = pb.ExplainResponse(request_id=request_id, cost=_cost(job))
    for t in range(len(result.targets)):
        _outline(response.maps.add(), parsed, result, t)
    _add_predictions(response, parsed.model, result.logits, parsed.top_k or TOP_K)
    _add_receipt(response.receipt, request_id, parsed, job, result)
    response.receipt.input_digest = input_digest
    if parsed.raw:
        for message, raw in zip(response.maps, result.raw, strict=True):
            set_tensor(message.raw, raw)
    return response


def evaluate_response(
    request_id: str,
    parsed: ParsedRequest,
    input_digest: str,
    job: Job[RequestResult],
    result: RequestResult,
    further_warnings: Sequence[str],
) -> pb.EvaluateResponse:
    """Return the response to Evaluate. The arguments are those of `explain_response`."""
    response = evaluate_outline(request_id, parsed, input_digest, job, result)
    add_maps([response.map], response.receipt, result, parsed.map_format, further_warnings)
    return response


def evaluate_outline(
    request_id: str, parsed: ParsedRequest, input_digest: str, job: Job[RequestResult], result: RequestResult
) -> pb.EvaluateResponse:
    """Return the response to Evaluate without what `add_maps` adds."""
    response = pb.EvaluateResponse(request_id=request_id, cost=_cost(job))
    _outline(response.map, parsed, result, 0)
    _add_receipt(response.receipt, request_id, parsed, job, result)
    response.receipt.input_digest = input_digest
    return response


def add_maps(
    messages: Iterable[pb.SaliencyMap],
    receipt: pb.Receipt,
    result: LazyMaps,
    map_format: MapFormat,
    further_warnings: Sequence[str],
) -> None:
    """Add the finished maps, their warnings and their digests to a response.

    The large fields of a response are set in place, because protobuf copies a message that becomes part of another one.

    Args:
        messages: The message of each map.
        receipt: The receipt of the response.
        result: The maps of the plan, which are finished now if no metric needed them.
        map_format: The format of the maps. It does not affect their digests.
        further_warnings: Warnings about the image and of the engine; they follow those of each map.
    """
    maps = result.maps
    returned = native_maps(result.raw, maps, own_scaling=result.own_scaling) if map_format.native else maps
    for message, saliency, full, warnings in zip(messages, returned, maps, result.warnings, strict=True):
        set_tensor(message.saliency, saliency, map_format.dtype)
        message.input_size.extend(full.shape if map_format.native else ())
        message.warnings.extend((*warnings, *further_warnings))
        receipt.map_digests.append(digest(full))


def least_bytes(parsed: ParsedRequest) -> int:
    """Return a lower bound of the size of the response in bytes, which is known before any work: that of its maps.

    The size of maps at native resolution and of raw maps depends on the method, and is not included.
    """
    targets = parsed.targets if isinstance(parsed.targets, int) else len(parsed.targets)
    if parsed.map_format.native:
        return 0
    height, width = parsed.model.preprocessing.size
    return targets * height * width * ITEM_BYTES[parsed.map_format.dtype]


def level(event: Level, model: Model, map_format: MapFormat) -> pb.Level:
    """Return the message for a level of Poly-CAM, resized and scaled like the final map."""
    on_host = replace(event.maps, raw=event.maps.raw.cpu())
    size = model.preprocessing.size
    maps, _ = finish_maps(on_host, size)
    native = map_format.native
    returned = native_maps(on_host.raw, maps, own_scaling=on_host.finish is not None) if native else maps
    return pb.Level(
        index=event.index,
        count=event.count,
        layer=event.layer,
        saliency=[tensor(each, map_format.dtype) for each in returned],
        input_size=size if native else (),
    )


def randomised(event: Randomised, map_format: MapFormat) -> pb.Randomised:
    """Return the message for the map of a network with random weights and its similarity to the original map."""
    return pb.Randomised(
        order=event.order,
        index=event.index,
        count=event.count,
        layers=event.layers,
        target=event.target,
        **asdict(event.similarity),
        saliency=tensor(event.saliency, map_format.dtype),
    )


def model_message(config: ModelConfig, state: str, model: Model | None) -> pb.Model:
    """Return an entry of ListModels; it describes the model only if the model is loaded."""
    return loaded_message(model) if model else pb.Model(name=config.name, source=config.source, state=state)


def loaded_message(model: Model) -> pb.Model:
    """Return the description of a loaded model."""
    return pb.Model(
        name=model.name,
        source=model.source,
        digest=model.digest,
        state="ready",
        input_size=model.preprocessing.size,
        classes=model.classes,
        labels=model.labels,
        layers=[_layer(layer) for layer in model.layers],
        layer=model.layer.name if model.layer else "",
        precision=model.precision,
        precisions=[*model.precisions],
        device=model.device.type,
        batch_sizes=_batch_sizes(model.batch_sizes),
        methods=[name for name, method in sorted(registry.METHODS.items()) if not unsupported_reason(method, model)],
        random_weights=model.random_weights,
        input_channels=model.preprocessing.channels,
        head=model.head,
        unavailable={str(kind): reason for kind, reason in model.unavailable.items()},
        named_layers=[_layer(layer) for layer in model.spatial.values()],
        warnings=model.warnings,
        devices=model.devices,
    )


def method_message(method: registry.Method, model: Model | None) -> pb.Method:
    """Return an entry of ListMethods, with the rows that the method takes on `model` if one is given."""
    message = pb.Method(
        name=method.name,
        title=method.title,
        paper=method.paper,
        summary=method.summary,
        layers=method.layers,
        parameters=[_parameter(p) for p in method.parameters],
        needs=registry.NEEDS[method.needs],
        anytime=method.min_rows is not None,
        seeded=method.seeded,
        class_agnostic=method.class_agnostic,
        equations=method.equations,
        advice=method.advice,
    )
    if model is not None:
        message.unavailable = unsupported_reason(method, model)
        if not message.unavailable:
            layers = () if method.layers == "none" else model.default_layers(method.layers == "many")
            call = MethodCall(method, method.check({}, ""), layers)
            message.rows = rows_needed(model, call, (), 1).most
            message.rows_per_target = rows_needed(model, call, (), 2).most - message.rows
    return message


def metric_message(metric: registry.Metric) -> pb.Metric:
    """Return an entry of ListMetrics."""
    return pb.Metric(
        name=metric.name,
        title=metric.title,
        paper=metric.paper,
        summary=metric.summary,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        parameters=[_parameter(p) for p in metric.parameters],
        rows=metric.rows(registry.Sizes([]), **metric.check({}, "")),
        maps=metric.rows(registry.Sizes([], rows_per_map=1), **metric.check({}, ""))
        - metric.rows(registry.Sizes([]), **metric.check({}, "")),
        seeded=metric.seeded,
        needs_truth=metric.needs_truth,
    )


def _outline(message: pb.SaliencyMap, parsed: ParsedRequest, result: RequestResult, t: int) -> None:
    """Set all fields of the message of a map but the map, its warnings and its raw values."""
    targets = result.targets
    _set_prediction(message.target, parsed.model, targets.index[t], float(targets.p[t]), float(targets.y[t]))
    message.share = result.share
    for call, score in zip(parsed.metrics, result.scores[t], strict=True):
        message.scores.add(metric=call.metric.name, value=score.value, unit=call.metric.unit, curve=score.curve)
    for each in result.left_out:
        message.left_out.add(layer=each.layer, channels=each.channels, rows=each.rows, error=each.error[t])


def _add_predictions(response: pb.ExplainResponse, model: Model, logits: Tensor, top_k: int) -> None:
    p = model.probabilities(logits)
    best = p.argsort(descending=True, stable=True)[:top_k]
    values = zip(best.tolist(), p[best].tolist(), logits[best].tolist(), strict=True)
    for each in values:
        _set_prediction(response.predictions.add(), model, *each)


def _set_prediction(message: pb.Prediction, model: Model, index: int, probability: float, logit: float) -> None:
    message.index, message.label = index, model.label(index)
    message.probability, message.logit = probability, logit


def _cost(job: Job[Any]) -> pb.Cost:
    return pb.Cost(rows=job.rows, batches=job.batches, queue_ms=job.queue_ms, compute_ms=job.compute_ms)


def _add_receipt(
    receipt: pb.Receipt, request_id: str, parsed: ParsedRequest, job: Job[RequestResult], result: RequestResult
) -> None:
    """Set all fields of a receipt but the digests of the input and of the maps."""
    model, call = parsed.model, parsed.method
    receipt.CopyFrom(_constant_receipt(model))
    receipt.request_id = request_id
    if call is not None:
        receipt.method = call.method.name
        receipt.layers.extend(layer.name for layer in call.layers)
    receipt.parameters.CopyFrom(struct(call.parameters if call else {}))
    receipt.targets.extend(result.targets.index)
    receipt.seed = parsed.seed
    receipt.batch_sizes.update(_batch_sizes(job.batch_sizes))
    if parsed.image.HasField("tensor"):
        receipt.preprocessing = "as given"
    receipt.budget = job.rows_at_early_stop


_constant_receipts: WeakKeyDictionary[Model, pb.Receipt] = WeakKeyDictionary()


def _constant_receipt(model: Model) -> pb.Receipt:
    """Return the fields of a receipt that all requests for a model have in common."""
    receipt = _constant_receipts.get(model)
    if receipt is None:
        receipt = _constant_receipts[model] = pb.Receipt(
            model=model.name,
            model_digest=model.digest,
            precision=model.precision,
            device=model.device.type,
            device_name=model.device_name,
            preprocessing=str(model.preprocessing),
            versions={**versions(), **_versions_of(model)},
        )
    return receipt


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of the packages on which a map depends, and of Python."""
    packages = ("camserve", "torch", "torchvision", "timm", "pillow", "numpy")
    installed = {name: metadata.version(name) for name in packages}
    return {**installed, "python": platform.python_version()}


def _versions_of(model: Model) -> Mapping[str, str]:
    """Return the version of what runs or has compiled the forward pass in place of the network itself."""
    if model.compiled:
        return {"torch.compile": versions()["torch"]}
    return {"openvino": model.fast_forward.version} if isinstance(model.fast_forward, OpenVinoForward) else {}


def _batch_sizes(sizes: Mapping[LaneKind, int]) -> dict[str, int]:
    return {str(kind): size for kind, size in sizes.items()}


def _layer(layer: Layer) -> pb.Layer:
    return pb.Layer(
        name=layer.name,
        channels=layer.channels,
        height=layer.height,
        width=layer.width,
        signed=layer.signed,
        prefix_tokens=layer.prefix,
        cut=layer.cut,
    )


def _parameter(parameter: registry.Parameter) -> pb.Parameter:
    return pb.Parameter(
        name=parameter.name,
        type=parameter.type,
        default=_value(parameter.default),
        minimum=parameter.range.minimum if parameter.range else None,
        maximum=parameter.range.maximum if parameter.range else None,
        choices=parameter.choices,
        description=parameter.description,
    )


def _value(value: registry.Value) -> Value:
    if isinstance(value, bool):
        return Value(bool_value=value)
    return Value(string_value=value) if isinstance(value, str) else Value(number_value=value)


def struct(values: Mapping[str, registry.Value]) -> Struct:
    """Return the message for the values of parameters."""
    return Struct(fields={name: _value(value) for name, value in values.items()})
