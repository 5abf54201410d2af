"""The plan of one request: predict, settle the targets, make the maps, score them."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from camserve_server.engine.job import Limits
from camserve_server.errors import OutOfRange
from camserve_server.maps import concentration
from camserve_server.models.layers import Layer
from camserve_server.models.model import Model
from camserve_server.plan import (
    Ablate,
    Answer,
    Ascend,
    Cached,
    Explainer,
    Gradient,
    Image,
    LeftOut,
    MetricResult,
    Plan,
    Predict,
    Query,
    ReleaseRows,
    Report,
    SaliencyMaps,
    Score,
    Stage,
    Sum,
    Targets,
    Truth,
)
from camserve_server.registry import Method, Metric, Sizes, Value
from camserve_server.rows import resize, resize_minmax

T = TypeVar("T")


@dataclass(frozen=True)
class MethodCall:
    """A method with all that it is called with, checked."""

    method: Method
    parameters: Mapping[str, Value]
    layers: tuple[Layer, ...]
    seed: int = 0


@dataclass(frozen=True)
class MetricCall:
    """A metric with its parameters, checked."""

    metric: Metric
    parameters: Mapping[str, Value]
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Explained:
    """`maps` [T, H, W] float32 in [0, 1] and `raw` [T, h, w], on the host; `scores` a list for each target.

    `share` says how much of the method's full sum was done, in [0, 1]; `left_out` what could not matter much.
    """

    logits: Tensor
    targets: Targets
    maps: Tensor
    raw: Tensor
    scores: tuple[tuple[MetricResult, ...], ...]
    warnings: tuple[tuple[str, ...], ...]
    share: float = 1.0
    left_out: tuple[LeftOut, ...] = ()


def rows_needed(model: Model, call: MethodCall | None, metrics: Sequence[MetricCall], targets: int) -> int:
    """The most rows that the request can take."""
    rows = 1 + rows_of_metrics(model, call, metrics, targets)
    if call is not None:
        rows += call.method.rows(_sizes(model, call, targets), **call.parameters)
    return rows


def _sizes(model: Model, call: MethodCall, targets: int) -> Sizes:
    return Sizes([layer.channels for layer in call.layers], targets, model.preprocessing.size)


def rows_of_metrics(model: Model, call: MethodCall | None, metrics: Sequence[MetricCall], targets: int) -> int:
    """The most rows that the scores of so many maps can take."""
    one = Sizes([], 1, model.preprocessing.size, _again(model, call))
    return targets * sum(m.metric.rows(one, **m.parameters) for m in metrics)


def _again(model: Model, call: MethodCall | None) -> int:
    """The most rows that the map of another image takes."""
    return 1 + call.method.rows(_sizes(model, call, 1), **call.parameters) if call else 0


def limits(
    model: Model,
    call: MethodCall | None,
    metrics: Sequence[MetricCall],
    targets: int,
    *,
    budget: int,
    deadline: float | None,
) -> Limits:
    """What the request has to keep to, so that a method that can stop early does so in time.

    `budget` rows (0: no limit); `deadline` of `time.monotonic()`. Raises OutOfRange for a budget that cannot be kept
    to.
    """
    reserved = rows_of_metrics(model, call, metrics, targets)
    least = rows_needed(model, call, metrics, targets)
    anytime = call is not None and call.method.min_rows is not None
    if call is not None and call.method.min_rows is not None:
        least = 1 + reserved + call.method.min_rows(_sizes(model, call, targets), **call.parameters)
    takes = f"{_subject(call)} takes {'at least ' if anytime else ''}{least} rows"
    if budget and budget < least:
        metrics_too = f", {reserved} of them for metrics" if reserved else ""
        why = "" if anytime else ", and cannot stop early"
        raise OutOfRange(f"{takes} here{metrics_too}{why}; the budget is {budget}", field="budget")
    until, rate = None, model.rows_per_s.get("forward", 0.0)
    if deadline is not None and anytime and rate:
        # Metrics, the answer and the way back need their time.
        until = deadline - 1.5 * reserved / rate - 0.1 * (deadline - time.monotonic())
    return Limits(deadline, until, budget or None, reserved, least, rate)


def _subject(call: MethodCall | None) -> str:
    return call.method.name if call else "the request"


def explain(
    model: Model,
    x: Image,
    targets: Sequence[int] | int,
    subject: MethodCall | Tensor,
    metrics: Sequence[MetricCall],
    truth: Truth | None = None,
) -> Plan[Explained]:
    """A map for each target (or for so many of the likeliest classes, if it is a number), and its scores.

    `subject` is the method that makes the maps, or the one map [h, w] that is to be scored. `truth` is where all of
    the targets are, for metrics that need it.
    """
    yield from Report(Stage("predict"))
    logits = yield from Predict(x)
    likeliest = logits.argsort(descending=True, stable=True)
    index = tuple(likeliest[:targets].tolist() if isinstance(targets, int) else targets)
    at = torch.tensor(index, device=logits.device)
    c = Targets(index, model.probabilities(logits)[at], logits[at])

    left_out: tuple[LeftOut, ...] = ()
    if isinstance(subject, Tensor):
        raw = subject[None].to(x.tensor)
        maps = resize(raw, x.size).clamp(0, 1)
        share, warnings = 1.0, [_constant(maps[0])]
    else:
        yield from Report(Stage("explain"))
        result = yield from _call(subject, x, c)
        raw, share, left_out = result.raw, result.share, result.left_out
        maps, warnings = finished(result, x.size)
    warnings = [known or concentration.degenerate_warnings(S) for S, known in zip(maps, warnings, strict=True)]

    scores, again = [], _again(model, subject if isinstance(subject, MethodCall) else None)
    for t in range(len(c)):
        one = Targets((c.index[t],), c.p[t : t + 1], c.y[t : t + 1])
        measured: list[MetricResult] = []
        known: dict[Hashable, object] = {}
        for call in metrics:
            yield from Report(Stage(call.metric.name))
            has = {
                "seed": call.seed,
                "explain": Explainer(partial(_remade, model, subject, c.index[t]), again),
                "truth": truth,
                "predicted": int(likeliest[0]),
            }
            given = {name: has[name] for name in call.metric.request_keywords}
            plan = call.metric.plan(x, one, maps[t], **call.parameters, **given)
            measured.append((yield from _once(plan, known)))
        scores.append(tuple(measured))
    c = Targets(c.index, c.p.cpu(), c.y.cpu())
    return Explained(
        logits.cpu(), c, maps.float().cpu(), raw.float().cpu(), tuple(scores), tuple(warnings), share, left_out
    )


def _call(call: MethodCall, x: Image, c: Targets) -> Plan[SaliencyMaps]:
    names = [layer.name for layer in call.layers]
    where = {"none": (), "one": tuple(names), "many": (names,)}[call.method.layers]
    seed = {"seed": call.seed} if call.method.seeded else {}
    result: SaliencyMaps = yield from call.method.plan(x, c, *where, **call.parameters, **seed)
    return result


def _remade(model: Model, call: MethodCall | Tensor, c: int, x: Image) -> Plan[Tensor]:
    """The map [H, W] in [0, 1] of another image for the same class; whatever it remarks upon is left unsaid."""
    assert isinstance(call, MethodCall), "a map that was given cannot be made again"
    logits = yield from Predict(x)
    at = torch.tensor([c], device=logits.device)
    result = yield from _quietly(_call(call, x, Targets((c,), model.probabilities(logits)[at], logits[at])))
    return finished(result, x.size)[0][0]


def _quietly(plan: Plan[T]) -> Plan[T]:
    """The plan without its reports, and whole: a budget or a deadline that has cut the map cuts no metric."""
    answer: Answer[Any] | None = None
    while True:
        try:
            query = plan.send(answer)  # type: ignore[arg-type]  # the first send of a generator must be None
        except StopIteration as stop:
            result: T = stop.value
            return result
        answer = _nothing if isinstance(query, Report) else (yield _whole(query))


def _whole(query: Query[Any]) -> Query[Any]:
    if isinstance(query, Sum):
        return replace(query, query=_whole(query.query))
    return replace(query, min_rows=None) if isinstance(query, (Score, Ablate, Gradient, Ascend)) else query


def _nothing() -> None:
    return None


def _once(plan: Plan[Any], known: dict[Hashable, object]) -> Plan[Any]:
    """Runs the plan; what it asks for `Cached` is taken from `known`, or run and noted there."""
    answer: Answer[Any] | None = None
    while True:
        try:
            query = plan.send(answer)  # type: ignore[arg-type]  # the first send of a generator must be None
        except StopIteration as stop:
            return stop.value
        if isinstance(query, Cached):
            if query.key in known:
                yield from ReleaseRows(query.rows)
            else:
                known[query.key] = yield from _once(query.plan(), known)
            answer = partial(known.get, query.key)
        else:
            answer = yield query


def finished(result: SaliencyMaps, size: tuple[int, int]) -> tuple[Tensor, list[tuple[str, ...]]]:
    """[T, H, W] in [0, 1] at the input's size, and each map's warnings.

    A map that is constant or not finite becomes zeros, with a warning, never NaN.
    """
    maps = (result.finish or resize_minmax)(result.raw, size)
    finite = maps.isfinite().flatten(1).all(dim=1)
    low, high = maps.flatten(1).amin(dim=1), maps.flatten(1).amax(dim=1)
    constant = finite & (low == high)
    maps = torch.where((finite & ~constant)[:, None, None], maps.clamp(0, 1), 0.0)
    return maps, [_degenerate(*kind) for kind in zip(finite.tolist(), constant.tolist(), strict=True)]


def _constant(S: Tensor) -> tuple[str, ...]:
    return ("degenerate: the map is constant",) if S.min() == S.max() else ()


def _degenerate(finite: bool, constant: bool) -> tuple[str, ...]:
    if not finite:
        return ("degenerate: the map is not finite; zeros are returned",)
    return ("degenerate: the map is constant; zeros are returned",) if constant else ()
