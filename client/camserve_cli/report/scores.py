"""The numbers of a report: means with their intervals, who is best, and who differs from the method of comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from camserve.catalogue import Metric
from camserve_cli.report import statistics
from camserve_cli.report.records import Record, Study

__all__ = ["ALPHA", "Cell", "Comparison", "Mean", "cells", "comparisons", "means", "number"]

# Of an error in any of the comparisons of one model.
ALPHA = 0.05


@dataclass(frozen=True)
class Mean:
    """Over images, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Of a method with the one of comparison, by a metric, over the `count` images that both have.

    `difference` is the mean of theirs; `better` says whether it is for the better; `adjusted` is Holm's p-value.
    """

    method: str
    metric: Metric
    difference: float
    count: int
    p: float
    adjusted: float

    @property
    def better(self) -> bool:
        """Whether the method does better than the one that it is compared with."""
        return (self.difference > 0) == self.metric.higher_is_better

    @property
    def significant(self) -> bool:
        """Whether it would be a surprise if there were no difference."""
        return self.adjusted < ALPHA


@dataclass(frozen=True)
class Cell:
    """What the table says of a method by a metric on a model; without a mean where nothing was done."""

    mean: Mean | None
    metric: Metric
    best: bool
    comparison: Comparison | None


def means(records: Iterable[Record], metrics: Sequence[Metric]) -> dict[str, Mean]:
    """By metric; nothing of no records."""
    values = np.array([[record.scores[metric.name] for metric in metrics] for record in records])
    if not values.size:
        return {}
    low, high = statistics.interval(values)
    return {
        metric.name: Mean(float(values[:, i].mean()), float(low[i]), float(high[i])) for i, metric in enumerate(metrics)
    }


def comparisons(study: Study, model: str) -> list[Comparison]:
    """Of every method with that of comparison by every metric; p-values are adjusted for being so many."""
    base = study.of(model, study.against)
    found = []
    for method in study.methods:
        other = study.of(model, method)
        both = [image for image in other if image in base]
        if method == study.against or not both:
            continue
        for metric in study.metrics:
            pairs = [other[image].scores[metric.name] - base[image].scores[metric.name] for image in both]
            found.append((method, metric, np.array(pairs)))
    p = [statistics.sign_flip(differences) for _, _, differences in found]
    return [
        Comparison(method, metric, float(differences.mean()), len(differences), raw, adjusted)
        for (method, metric, differences), raw, adjusted in zip(found, p, statistics.holm(p), strict=True)
    ]


def cells(study: Study, model: str) -> dict[tuple[str, str], Cell]:
    """The table of one model, by method and metric. Controls cannot be best."""
    compared = {(each.method, each.metric.name): each for each in comparisons(study, model)}
    of = {method: means(study.of(model, method).values(), study.metrics) for method in study.methods}
    table = {}
    for metric in study.metrics:
        rivals = [of[method][metric.name].value for method in of if of[method] and not study.is_control(method)]
        best = (max if metric.higher_is_better else min)(rivals, default=None)
        for method in study.methods:
            mean = of[method].get(metric.name)
            # Those that cannot be told apart as they are printed are best together.
            is_best = (
                mean is not None
                and best is not None
                and len(rivals) > 1
                and not study.is_control(method)
                and number(mean.value, metric) == number(best, metric)
            )
            table[method, metric.name] = Cell(mean, metric, is_best, compared.get((method, metric.name)))
    return table


def number(value: float, metric: Metric, *, sign: bool = False) -> str:
    """A score as it is printed: percentages with one decimal, other numbers with three, large ones with four digits."""
    precision = ".1f" if metric.unit == "%" else ".3f" if abs(value) < 100 else ".4g"
    text = f"{value:{'+' if sign else ''}{precision}}"
    return text.replace("-", "−")
