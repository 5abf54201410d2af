"""The plan of one request: predict, settle the targets, make the maps, score them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from camserve_server.models.layers import Layer
from camserve_server.models.model import Model
from camserve_server.plan import Image, Measured, Plan, Predict, Report, SaliencyMaps, Stage, Targets
from camserve_server.registry import Method, Metric, Sizes, Value
from camserve_server.rows import normalised, up


@dataclass(frozen=True)
class MethodCall:
    """A method with all that it is called with, checked."""

    method: Method
    parameters: Mapping[str, Value]
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class MetricCall:
    """A metric with its parameters, checked."""

    metric: Metric
    parameters: Mapping[str, Value]


@dataclass(frozen=True, eq=False)
class Explained:
    """`maps` [T, H, W] float32 in [0, 1] and `raw` [T, h, w], on the host; `scores` a list for each target."""

    logits: Tensor
    targets: Targets
    maps: Tensor
    raw: Tensor
    scores: tuple[tuple[Measured, ...], ...]
    warnings: tuple[tuple[str, ...], ...]


def rows_needed(model: Model, call: MethodCall | None, metrics: Sequence[MetricCall], targets: int) -> int:
    """The most rows that the request can take."""
    rows = 1
    if call is not None:
        sizes = Sizes([layer.channels for layer in call.layers], targets, model.preprocessing.size)
        rows += call.method.rows(sizes, **call.parameters)
    one = Sizes([], 1, model.preprocessing.size)
    return rows + targets * sum(m.metric.rows(one, **m.parameters) for m in metrics)


def explain(
    model: Model, x: Image, targets: Sequence[int], subject: MethodCall | Tensor, metrics: Sequence[MetricCall]
) -> Plan[Explained]:
    """A map for each target (the predicted class if there is none), and its scores.

    `subject` is the method that makes the maps, or the one map [h, w] that is to be scored.
    """
    yield from Report(Stage("predict"))
    logits = yield from Predict(x)
    index = tuple(targets) or (int(logits.argmax()),)
    at = torch.tensor(index, device=logits.device)
    c = Targets(index, model.probabilities(logits)[at], logits[at])

    if isinstance(subject, Tensor):
        raw = subject[None].to(x.tensor)
        maps = up(raw, x.size).clamp(0, 1)
        warnings: tuple[tuple[str, ...], ...] = (_constant(maps[0]),)
    else:
        yield from Report(Stage("explain"))
        result = yield from _call(subject, x, c)
        raw, (maps, warnings) = result.raw, finished(result, x.size)

    scores = []
    for t in range(len(c)):
        one = Targets((c.index[t],), c.p[t : t + 1], c.y[t : t + 1])
        measured = []
        for call in metrics:
            yield from Report(Stage(call.metric.name))
            measured.append((yield from call.metric.plan(x, one, maps[t], **call.parameters)))
        scores.append(tuple(measured))
    return Explained(logits.cpu(), c, maps.float().cpu(), raw.float().cpu(), tuple(scores), warnings)


def _call(call: MethodCall, x: Image, c: Targets) -> Plan[SaliencyMaps]:
    names = [layer.name for layer in call.layers]
    where = {"none": (), "one": tuple(names), "many": (names,)}[call.method.layers]
    result: SaliencyMaps = yield from call.method.plan(x, c, *where, **call.parameters)
    return result


def finished(result: SaliencyMaps, size: tuple[int, int]) -> tuple[Tensor, tuple[tuple[str, ...], ...]]:
    """[T, H, W] in [0, 1] at the input's size, and each map's warnings.

    A map that is constant or not finite becomes zeros, with a warning, never NaN.
    """
    maps = (result.finish or normalised)(result.raw, size)
    finite = maps.isfinite().flatten(1).all(dim=1)
    low, high = maps.flatten(1).amin(dim=1), maps.flatten(1).amax(dim=1)
    constant = finite & (low == high)
    maps = torch.where((finite & ~constant)[:, None, None], maps.clamp(0, 1), 0.0)
    return maps, tuple(_degenerate(*kind) for kind in zip(finite.tolist(), constant.tolist(), strict=True))


def _constant(S: Tensor) -> tuple[str, ...]:
    return ("degenerate: the map is constant",) if S.min() == S.max() else ()


def _degenerate(finite: bool, constant: bool) -> tuple[str, ...]:
    if not finite:
        return ("degenerate: the map is not finite; zeros are returned",)
    return ("degenerate: the map is constant; zeros are returned",) if constant else ()
