"""The figures of a report: which curves, points and pictures go together, and what their axes say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from camserve.catalogue import Metric
from camserve_cli.report import charts, statistics
from camserve_cli.report.records import Record, Study
from camserve_cli.report.scores import Mean

__all__ = ["Figure", "cost_figures", "curve_figures", "layer_figures"]

Numbers = NDArray[np.float64]

# Beside the method of comparison; more than these cannot be told apart in one chart.
_OTHERS = 5


@dataclass(frozen=True)
class Figure:
    """A chart, as SVG, and its caption."""

    svg: str
    title: str
    caption: str


@dataclass(frozen=True)
class _Axes:
    """What the axes of a metric's curve say; `x` gives where the points lie, of how many there are."""

    x_label: str
    y_label: str
    x: Callable[[int], Numbers]


def _after_each(count: int) -> Numbers:
    return 100 * np.arange(1, count + 1) / count


_PROBABILITY = "probability of the class"
_AXES = {
    "insertion": _Axes("pixels put in, %", _PROBABILITY, _after_each),
    "deletion": _Axes("pixels taken out, %", _PROBABILITY, _after_each),
    "aopc": _Axes("regions disturbed", _PROBABILITY, lambda count: np.arange(count, dtype=float)),
    "road": _Axes(
        "pixels taken out, %",
        "½ (p least gone − p most gone)",
        lambda count: 100 * np.arange(1, count + 1) / (count + 1),
    ),
    "box-accuracy": _Axes("threshold of the map", "IoU with the target's box", lambda count: np.arange(count) / count),
    "randomisation": _Axes(
        "steps of randomisation, from the last layer",
        "likeness to the map of the network itself",
        lambda count: np.arange(1, count + 1, dtype=float),
    ),
}
_ANY = _Axes("point of the curve", "value", lambda count: np.arange(1, count + 1, dtype=float))


def _axes(metric: str) -> _Axes:
    return _AXES.get("randomisation" if metric.startswith("randomisation") else metric, _ANY)


# ---- curves ---------------------------------------------------------------------------------------------------------


def curve_figures(study: Study, model: str) -> list[list[Figure]]:
    """For a few methods at a time, with that of comparison: the mean curves by each metric that has some."""
    others = [method for method in study.methods if method != study.against]
    groups = [others[i : i + _OTHERS] for i in range(0, len(others), _OTHERS)] or [[]]
    drawn = [
        [figure for metric in study.metrics if (figure := _curves(study, model, [study.against, *group], metric))]
        for group in groups
    ]
    return [each for each in drawn if each]


def _curves(study: Study, model: str, methods: Sequence[str], metric: Metric) -> Figure | None:
    found = {method: _stacked(study.of(model, method).values(), metric) for method in methods}
    points = Counter(curve.shape[1] for curve in found.values() if curve.size)
    if not points:
        return None
    [(count, _)] = points.most_common(1)
    drawn = [
        charts.Curve(method, curve.mean(0), *statistics.interval(curve))
        for method, curve in found.items()
        if curve.size and curve.shape[1] == count
    ]
    alt = f"{metric.title} curves on {model}: {', '.join(curve.label for curve in drawn)}."
    axes = _axes(metric.name)
    svg = charts.curves(alt, drawn, axes.x(count), axes.x_label, axes.y_label)
    return Figure(svg, metric.title, _better(metric))


def _stacked(records: Iterable[Record], metric: Metric) -> Numbers:
    """The curves of the images, [N, P]; of the commonest number of points, for a model may make them differ."""
    found = [record.curves[metric.name] for record in records if metric.name in record.curves]
    if not found:
        return np.empty((0, 0))
    [(count, _)] = Counter(map(len, found)).most_common(1)
    return np.array([curve for curve in found if len(curve) == count])


# ---- cost and layers ------------------------------------------------------------------------------------------------


def cost_figures(study: Study, model: str, rows: dict[str, float], means: dict[str, dict[str, Mean]]) -> list[Figure]:
    """For each metric: the mean score of each method over the rows that it took."""
    figures = []
    for metric in study.metrics:
        points = [
            charts.Point(method, rows[method], mean.value, mean.low, mean.high, hollow=study.is_control(method))
            for method in study.methods
            if method in rows and (mean := means[method].get(metric.name))
        ]
        if len(points) > 1:
            alt = f"{metric.title} over rows on {model}, a point for each method."
            figures.append(
                Figure(
                    charts.scatter(alt, points, "rows an image", _with_unit(metric)),
                    metric.title,
                    _better(metric),
                )
            )
    return figures


def layer_figures(
    study: Study, alt: str, x_label: str, ticks: Sequence[str], rows: Sequence[dict[str, Mean]]
) -> list[Figure]:
    """For each metric: the mean score of each layer, or number of layers."""
    figures = []
    for metric in study.metrics:
        points = [
            charts.Point(tick, i, mean.value, mean.low, mean.high)
            for i, (tick, means) in enumerate(zip(ticks, rows, strict=True))
            if (mean := means.get(metric.name))
        ]
        if len(points) > 1:
            figures.append(
                Figure(
                    charts.layers(f"{metric.title} {alt}", points, x_label, _with_unit(metric)),
                    metric.title,
                    _better(metric),
                )
            )
    return figures


def _better(metric: Metric) -> str:
    return f"{'higher' if metric.higher_is_better else 'lower'} is better"


def _with_unit(metric: Metric) -> str:
    return metric.title if metric.unit == "1" else f"{metric.title}, {metric.unit}"
