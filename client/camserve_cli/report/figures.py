"""Figures of a report: selection of curves and points, captions, and labels of the axes."""

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

# Methods in one chart, in addition to the method with which they are compared. More lines are hard to distinguish.
_OTHERS = 5


@dataclass(frozen=True)
class Figure:
    """Chart with its caption.

    Attributes:
        svg: The chart as an SVG element.
        title: Title of the chart.
        caption: Text after the title.
    """

    svg: str
    title: str
    caption: str


@dataclass(frozen=True)
class _Axes:
    """Labels of the axes for the curve of a metric. `x` returns the positions of a number of points."""

    x_label: str
    y_label: str
    x: Callable[[int], Numbers]


def _after_each_step(count: int) -> Numbers:
    return 100 * np.arange(1, count + 1) / count


_PROBABILITY = "probability of the class"
_AXES = {
    "insertion": _Axes("pixels inserted, %", _PROBABILITY, _after_each_step),
    "deletion": _Axes("pixels removed, %", _PROBABILITY, _after_each_step),
    "aopc": _Axes("perturbed regions", _PROBABILITY, lambda count: np.arange(count, dtype=float)),
    "road": _Axes(
        "pixels removed, %",
        "½ (p least − p most removed)",
        lambda count: 100 * np.arange(1, count + 1) / (count + 1),
    ),
    "box-accuracy": _Axes("threshold of the map", "IoU with the target's box", lambda count: np.arange(count) / count),
    "randomisation": _Axes(
        "steps of randomisation, from the last layer",
        "similarity to the original map",
        lambda count: np.arange(1, count + 1, dtype=float),
    ),
}
_ANY = _Axes("point of the curve", "value", lambda count: np.arange(1, count + 1, dtype=float))


def _axes(metric: str) -> _Axes:
    return _AXES.get("randomisation" if metric.startswith("randomisation") else metric, _ANY)


# ---- curves ---------------------------------------------------------------------------------------------------------


def curve_figures(study: Study, model: str) -> list[list[Figure]]:
    """Draw the mean curves of each metric that has curves.

    Returns:
        Groups of figures. Each group shows a few methods together with the method with which they are compared.
    """
    others = [method for method in study.methods if method != study.against]
    groups = [others[i : i + _OTHERS] for i in range(0, len(others), _OTHERS)] or [[]]
    drawn = [
        [figure for metric in study.metrics if (figure := _curves(study, model, [study.against, *group], metric))]
        for group in groups
    ]
    return [each for each in drawn if each]


def _curves(study: Study, model: str, methods: Sequence[str], metric: Metric) -> Figure | None:
    curves = {method: _stacked(study.finished(model, method).values(), metric) for method in methods}
    points = Counter(curve.shape[1] for curve in curves.values() if curve.size)
    if not points:
        return None
    [(count, _)] = points.most_common(1)
    drawn = [
        charts.Curve(method, curve.mean(0), *statistics.interval(curve))
        for method, curve in curves.items()
        if curve.size and curve.shape[1] == count
    ]
    alt = f"{metric.title} curves on {model}: {', '.join(curve.label for curve in drawn)}."
    axes = _axes(metric.name)
    svg = charts.curves(alt, drawn, axes.x(count), axes.x_label, axes.y_label)
    return Figure(svg, metric.title, _better(metric))


def _stacked(records: Iterable[Record], metric: Metric) -> Numbers:
    """Return the curves of N images, [N, P].

    The number of points P may differ between images. Curves that do not have the most common number are left out.
    """
    curves = [record.curves[metric.name] for record in records if metric.name in record.curves]
    if not curves:
        return np.empty((0, 0))
    [(count, _)] = Counter(map(len, curves)).most_common(1)
    return np.array([curve for curve in curves if len(curve) == count])


# ---- cost and layers ------------------------------------------------------------------------------------------------


def cost_figures(study: Study, model: str, rows: dict[str, float], means: dict[str, dict[str, Mean]]) -> list[Figure]:
    """Draw the mean score of each method over its number of rows, one figure for each metric.

    Args:
        study: The study.
        model: Name of the model.
        rows: Mean number of rows for each image, by method.
        means: Mean scores, by method and metric.
    """
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
                    charts.scatter(alt, points, "rows per image", _with_unit(metric)),
                    metric.title,
                    _better(metric),
                )
            )
    return figures


def layer_figures(
    study: Study, alt: str, x_label: str, ticks: Sequence[str], rows: Sequence[dict[str, Mean]]
) -> list[Figure]:
    """Draw the mean score over the layers, one figure for each metric.

    Args:
        study: The study.
        alt: Second part of the description for screen readers, after the title of the metric.
        x_label: Label of the x axis.
        ticks: Text of the tick of each layer.
        rows: Mean scores by metric, for each layer.
    """
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
