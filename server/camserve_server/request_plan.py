"""The plan of one request: predict, settle the targets, make the maps, and score them."""

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
from camserve_server.request_result import FinishedMaps, RequestResult, constant_warning, finish_maps
from camserve_server.rows import resize

T = TypeVar("T")


@dataclass(frozen=True)
class MethodCall:
    """A method with checked arguments.

    Attributes:
        method: The registered method.
        parameters: The value of every parameter, defaults included.
        layers: The layers that the method reads, from fine to coarse.
        seed: The seed of methods that use random numbers.
    """

    method: Method
    parameters: Mapping[str, Value]
    layers: tuple[Layer, ...]
    seed: int = 0


@dataclass(frozen=True)
class MetricCall:
    """A metric with checked arguments.

    Attributes:
        metric: The registered metric.
        parameters: The value of every parameter, defaults included.
        seed: The seed of metrics that use random numbers.
    """

    metric: Metric
    parameters: Mapping[str, Value]
    seed: int = 0


@dataclass(frozen=True)
class RowsNeeded:
    """The rows that a request can take. Each count includes the prediction.

    Attributes:
        most: The upper bound.
        least: The fewest rows with which the request can be answered; less than `most` only if it can stop early.
        metrics: The part of both counts that belongs to metrics.
        can_stop_early: The method can return a map before it has used all rows.
    """

    most: int
    least: int
    metrics: int
    can_stop_early: bool


def rows_needed(model: Model, call: MethodCall | None, metrics: Sequence[MetricCall], targets: int) -> RowsNeeded:
    """Return the rows that a request can take.

    Args:
        model: The model that the request names.
        call: The method, or None if the request brings a map.
        metrics: The metrics that score each map.
        targets: The number of maps.
    """
    one_map = Sizes([], 1, model.preprocessing.size, _rows_of_another_map(model, call))
    metric_rows = targets * sum(m.metric.rows(one_map, **m.parameters) for m in metrics)
    if call is None:
        return RowsNeeded(1 + metric_rows, 1 + metric_rows, metric_rows, can_stop_early=False)
    method, sizes = call.method, _sizes(model, call, targets)
    most = 1 + metric_rows + method.rows(sizes, **call.parameters)
    if method.min_rows is None:
        return RowsNeeded(most, most, metric_rows, can_stop_early=False)
    least = 1 + metric_rows + method.min_rows(sizes, **call.parameters)
    return RowsNeeded(most, least, metric_rows, can_stop_early=True)


def _sizes(model: Model, call: MethodCall, targets: int) -> Sizes:
    return Sizes([layer.channels for layer in call.layers], targets, model.preprocessing.size)


def _rows_of_another_map(model: Model, call: MethodCall | None) -> int:
    """Return the upper bound of the rows for the map of another image."""
    return 1 + call.method.rows(_sizes(model, call, 1), **call.parameters) if call else 0


def limits(
    model: Model, call: MethodCall | None, rows: RowsNeeded, *, budget: int = 0, deadline: float | None = None
) -> Limits:
    """Return the limits that the engine applies to a request.

    Args:
        model: The model that the request names.
        call: The method, or None if the request brings a map.
        rows: The rows that the request can take.
        budget: The most rows that the caller allows; 0 for no budget.
        deadline: The caller's deadline, on the clock of `time.monotonic()`.

    Raises:
        OutOfRange: The request needs more rows than the budget allows.
    """
    if budget and budget < rows.least:
        subject = call.method.name if call else "the request"
        at_least = "at least " if rows.can_stop_early else ""
        metrics_too = f", {rows.metrics} of them for metrics" if rows.metrics else ""
        why = "" if rows.can_stop_early else ", and cannot stop early"
        raise OutOfRange(
            f"{subject} takes {at_least}{rows.least} rows here{metrics_too}{why}; the budget is {budget}",
            field="budget",
        )
    answer_early_from, throughput = None, model.throughput["forward"]
    if deadline is not None and rows.can_stop_early and throughput.average:
        # Keep time for the metrics, for the encoding of the response and for its transfer.
        answer_early_from = deadline - 1.5 * rows.metrics / throughput.average - 0.1 * (deadline - time.monotonic())
    return Limits(deadline, answer_early_from, budget or None, rows.metrics, rows.least, _best_rate(model, rows))


def _best_rate(model: Model, rows: RowsNeeded) -> float:
    """Return the highest recent rate at which the rows of a request can run; 0 if it is unknown."""
    best = model.throughput["forward"].best()
    if rows.most <= model.batch_sizes.get("forward-small", 0):  # all of its queries have small lanes
        best = max(best, model.throughput["forward-small"].best())
    return best


def plan_request(
    model: Model,
    x: Image,
    targets: Sequence[int] | int,
    subject: MethodCall | Tensor,
    metrics: Sequence[MetricCall],
    truth: Truth | None = None,
) -> Plan[RequestResult]:
    """Predict, settle the targets, make a map for each target, and score the maps.

    Args:
        model: The model that the request names.
        x: The preprocessed image.
        targets: Class indices, or the number of the most probable classes to explain.
        subject: The method that makes the maps, or one map [h, w] in [0, 1] to score.
        metrics: The metrics that score each map.
        truth: The location of all targets, for metrics that need it.
    """
    yield from Report(Stage("predict"))
    logits = yield from Predict(x)
    ranking = logits.argsort(descending=True, stable=True)
    index = tuple(ranking[:targets].tolist() if isinstance(targets, int) else targets)
    at = torch.tensor(index, device=logits.device)
    c = Targets(index, model.probabilities(logits)[at], logits[at])

    finished = None
    if isinstance(subject, Tensor):
        result = SaliencyMaps(subject[None].to(x.tensor))
        maps = resize(result.raw, x.size).clamp(0, 1)
        finished = FinishedMaps(maps, (constant_warning(maps[0]),))
    else:
        yield from Report(Stage("explain"))
        result = yield from _method_plan(subject, x, c)
        if metrics:
            finished = finish_maps(result, x.size)

    scores = []
    rows_of_another_map = _rows_of_another_map(model, subject if isinstance(subject, MethodCall) else None)
    for t in range(len(c)):
        one = Targets((c.index[t],), c.p[t : t + 1], c.y[t : t + 1])
        measured: list[MetricResult] = []
        answered: dict[Hashable, object] = {}
        for call in metrics:
            yield from Report(Stage(call.metric.name))
            from_request = {
                "seed": call.seed,
                "explain": Explainer(partial(_another_map, model, subject, c.index[t]), rows_of_another_map),
                "truth": truth,
                "predicted": int(ranking[0]),
            }
            keywords = {name: from_request[name] for name in call.metric.request_keywords}
            assert finished is not None, "the maps are finished before they are scored"
            plan = call.metric.plan(x, one, finished.maps[t], **call.parameters, **keywords)
            measured.append((yield from _answer_once(plan, answered)))
        scores.append(tuple(measured))
    return RequestResult(result, x.size, finished, Targets(c.index, c.p.cpu(), c.y.cpu()), tuple(scores), logits)


def _method_plan(call: MethodCall, x: Image, c: Targets) -> Plan[SaliencyMaps]:
    names = [layer.name for layer in call.layers]
    layers = {"none": (), "one": tuple(names), "many": (names,)}[call.method.layers]
    seed = {"seed": call.seed} if call.method.seeded else {}
    result: SaliencyMaps = yield from call.method.plan(x, c, *layers, **call.parameters, **seed)
    return result


def _another_map(model: Model, call: MethodCall | Tensor, c: int, x: Image) -> Plan[Tensor]:
    """Make the map [H, W] in [0, 1] of another image for class c, without reports and warnings."""
    assert isinstance(call, MethodCall), "a metric that makes maps of other images needs a method"
    logits = yield from Predict(x)
    at = torch.tensor([c], device=logits.device)
    result = yield from _without_reports(
        _method_plan(call, x, Targets((c,), model.probabilities(logits)[at], logits[at]))
    )
    return finish_maps(result, x.size)[0][0]


def _without_reports(plan: Plan[T]) -> Plan[T]:
    """Run a plan without its reports and without early stops.

    A budget or a deadline may have stopped the plan of the map early. It does not change the value of a metric.
    """
    answer: Answer[Any] | None = None
    while True:
        try:
            query = plan.send(answer)  # type: ignore[arg-type]  # the first send of a generator must be None
        except StopIteration as stop:
            result: T = stop.value
            return result
        answer = _no_value if isinstance(query, Report) else (yield _without_early_stop(query))


def _without_early_stop(query: Query[Any]) -> Query[Any]:
    if isinstance(query, Sum):
        return replace(query, query=_without_early_stop(query.query))
    return replace(query, min_rows=None) if isinstance(query, (Score, Ablate, Gradient, Ascend)) else query


def _no_value() -> None:
    return None


def _answer_once(plan: Plan[Any], answered: dict[Hashable, object]) -> Plan[Any]:
    """Run a plan; take the answers of its `Cached` queries from `answered`, or run and store them."""
    answer: Answer[Any] | None = None
    while True:
        try:
            query = plan.send(answer)  # type: ignore[arg-type]  # the first send of a generator must be None
        except StopIteration as stop:
            return stop.value
        if isinstance(query, Cached):
            if query.key in answered:
                yield from ReleaseRows(query.rows)
            else:
                answered[query.key] = yield from _answer_once(query.plan(), answered)
            answer = partial(answered.get, query.key)
        else:
            answer = yield query
