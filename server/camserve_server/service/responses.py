"""Convert results to protobuf messages."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
from google.protobuf.struct_pb2 import Struct, Value
from torch import Tensor

from camserve.v1 import explain_pb2 as pb
from camserve_server import registry
from camserve_server.config import ModelConfig
from camserve_server.engine.job import Job
from camserve_server.models.layers import Layer
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.servable import unsupported_reason
from camserve_server.plan import Image, Level, Randomised
from camserve_server.request_plan import MethodCall, rows_needed
from camserve_server.request_result import RequestResult, finish_maps
from camserve_server.service.requests import ParsedRequest

TOP_K = 5


def explain_response(
    request_id: str,
    parsed: ParsedRequest,
    image: Image,
    job: Job[RequestResult],
    result: RequestResult,
    engine_warnings: Sequence[str],
) -> pb.ExplainResponse:
    """Return the response to Explain.

    Args:
        request_id: The identifier of the request.
        parsed: The fields of the request.
        image: The preprocessed image, whose digest the receipt contains.
        job: The finished job, which contains the cost.
        result: The result of the plan.
        engine_warnings: Warnings of the engine; they are added to those of each map.
    """
    maps = [_map(parsed, result, t, engine_warnings) for t in range(len(result.targets))]
    if parsed.raw:
        for message, raw in zip(maps, result.raw, strict=True):
            message.raw.CopyFrom(tensor(raw))
    return pb.ExplainResponse(
        request_id=request_id,
        maps=maps,
        predictions=_predictions(parsed.model, result.logits, parsed.top_k or TOP_K),
        cost=_cost(job),
        receipt=_receipt(request_id, parsed, image, job, result),
    )


def evaluate_response(
    request_id: str,
    parsed: ParsedRequest,
    image: Image,
    job: Job[RequestResult],
    result: RequestResult,
    engine_warnings: Sequence[str],
) -> pb.EvaluateResponse:
    """Return the response to Evaluate. The arguments are those of `explain_response`."""
    return pb.EvaluateResponse(
        request_id=request_id,
        map=_map(parsed, result, 0, engine_warnings),
        cost=_cost(job),
        receipt=_receipt(request_id, parsed, image, job, result),
    )


def level(event: Level, model: Model) -> pb.Level:
    """Return the message for a level of Poly-CAM, resized and scaled like the final map."""
    maps, _ = finish_maps(replace(event.maps, raw=event.maps.raw.cpu()), model.preprocessing.size)
    return pb.Level(index=event.index, count=event.count, layer=event.layer, saliency=[tensor(m) for m in maps])


def randomised(event: Randomised) -> pb.Randomised:
    """Return the message for the map of a network with random weights and its similarity to the original map."""
    return pb.Randomised(
        order=event.order,
        index=event.index,
        count=event.count,
        layers=event.layers,
        target=event.target,
        **asdict(event.similarity),
        saliency=tensor(event.saliency),
    )


def tensor(values: Tensor) -> pb.Tensor:
    """Return the message for a tensor of any shape: float32, little-endian."""
    array = values.cpu().numpy().astype("<f4", copy=False)
    return pb.Tensor(shape=array.shape, data=array.tobytes())


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
        named_layers=[_layer(layer) for layer in model.spatial.values()],
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


def _map(parsed: ParsedRequest, result: RequestResult, t: int, engine_warnings: Sequence[str]) -> pb.SaliencyMap:
    targets = result.targets
    return pb.SaliencyMap(
        target=_prediction(parsed.model, targets.index[t], float(targets.p[t]), float(targets.y[t])),
        saliency=tensor(result.maps[t]),
        scores=[
            pb.Score(metric=call.metric.name, value=score.value, unit=call.metric.unit, curve=score.curve)
            for call, score in zip(parsed.metrics, result.scores[t], strict=True)
        ],
        warnings=[*result.warnings[t], *engine_warnings],
        share=result.share,
        left_out=[
            pb.LeftOut(layer=each.layer, channels=each.channels, rows=each.rows, error=each.error[t])
            for each in result.left_out
        ],
    )


def _predictions(model: Model, logits: Tensor, top_k: int) -> list[pb.Prediction]:
    p = model.probabilities(logits)
    best = p.argsort(descending=True, stable=True)[:top_k]
    values = zip(best.tolist(), p[best].tolist(), logits[best].tolist(), strict=True)
    return [_prediction(model, *each) for each in values]


def _prediction(model: Model, index: int, probability: float, logit: float) -> pb.Prediction:
    return pb.Prediction(index=index, label=model.label(index), probability=probability, logit=logit)


def _cost(job: Job[Any]) -> pb.Cost:
    return pb.Cost(rows=job.rows, batches=job.batches, queue_ms=job.queue_ms, compute_ms=job.compute_ms)


def _receipt(
    request_id: str, parsed: ParsedRequest, image: Image, job: Job[RequestResult], result: RequestResult
) -> pb.Receipt:
    model, call = parsed.model, parsed.method
    return pb.Receipt(
        request_id=request_id,
        model=model.name,
        model_digest=model.digest,
        method=call.method.name if call else "",
        parameters=_struct(call.parameters if call else {}),
        layers=[layer.name for layer in call.layers] if call else [],
        targets=result.targets.index,
        seed=parsed.seed,
        precision=model.precision,
        device=model.device.type,
        batch_sizes=_batch_sizes(job.batch_sizes),
        preprocessing="as given" if parsed.image.HasField("tensor") else str(model.preprocessing),
        versions=versions(),
        budget=job.rows_at_early_stop,
        input_digest=_digest(image.tensor),
        map_digests=[_digest(saliency) for saliency in result.maps],
    )


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of the packages on which a map depends, and of Python."""
    packages = ("camserve", "torch", "torchvision", "timm", "pillow", "numpy")
    installed = {name: metadata.version(name) for name in packages}
    return {**installed, "python": platform.python_version()}


def _digest(values: Tensor) -> str:
    array = np.ascontiguousarray(values.cpu().numpy(), "<f4")
    return f"sha256:{hashlib.sha256(array.data).hexdigest()}"


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


def _struct(values: Mapping[str, registry.Value]) -> Struct:
    return Struct(fields={name: _value(value) for name, value in values.items()})
