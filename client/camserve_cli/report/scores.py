"""Scores of a report: means with confidence intervals, best methods, and comparisons with one method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from camserve.catalogue import Metric
from camserve_cli.report import statistics
from camserve_cli.report.records import Record, Study

__all__ = ["ALPHA", "Cell", "Comparison", "Mean", "cells", "comparisons", "means", "number"]

# Probability of one or more false positives among the comparisons of a model.
ALPHA = 0.05


@dataclass(frozen=True)
class Mean:
    """Mean over images.

    Attributes:
        value: The mean.
        low: Lower end of its 95 % confidence interval.
        high: Upper end of its 95 % confidence interval.
        count: Number of images. One image determines no interval, so `low` and `high` are the mean.
    """

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Comparison:
    """Comparison of a method with the reference method by one metric.

    Attributes:
        method: Label of the method.
        metric: The metric.
        difference: Mean difference from the reference method over the images that both have.
        count: Number of these images.
        p: Two-sided p-value.
        adjusted: p-value with Holm's correction for all comparisons of the model.
    """

    method: str
    metric: Metric
    difference: float
    count: int
    p: float
    adjusted: float

    @property
    def better(self) -> bool:
        """True if the method scores better than the reference method."""
        return (self.difference > 0) == self.metric.higher_is_better

    @property
    def significant(self) -> bool:
        """True if the adjusted p-value is below `ALPHA`."""
        return self.adjusted < ALPHA


@dataclass(frozen=True)
class Cell:
    """Cell of the table of a model.

    Attributes:
        mean: The mean score, or None if the method has no records.
        metric: The metric of the column.
        best: True if no method has a better mean, apart from the controls.
        comparison: Comparison with the reference method, or None.
    """

    mean: Mean | None
    metric: Metric
    best: bool
    comparison: Comparison | None


def means(records: Iterable[Record], metrics: Sequence[Metric]) -> dict[str, Mean]:
    """Return the mean of each metric. Without records the result is empty."""
    values = np.array([[record.scores[metric.name] for metric in metrics] for record in records])
    if not values.size:
        return {}
    low, high = statistics.interval(values)
    return {
        metric.name: Mean(float(values[:, i].mean()), float(low[i]), float(high[i]), len(values))
        for i, metric in enumerate(metrics)
    }


def comparisons(study: Study, model: str) -> list[Comparison]:
    """Compare every method with the reference method of the study by every metric."""
    base = study.finished(model, study.against)
    paired = []
    for method in study.methods:
        other = study.finished(model, method)
        both = [image for image in other if image in base]
        if method == study.against or not both:
            continue
        for metric in study.metrics:
            pairs = [other[image].scores[metric.name] - base[image].scores[metric.name] for image in both]
            paired.append((method, metric, np.array(pairs)))
    p = [statistics.sign_flip(differences) for _, _, differences in paired]
    return [
        Comparison(method, metric, float(differences.mean()), len(differences), raw, adjusted)
        for (method, metric, differences), raw, adjusted in zip(paired, p, statistics.holm(p), strict=True)
    ]


def cells(study: Study, model: str) -> dict[tuple[str, str], Cell]:
    """Return the cells of the table of one model, by method and metric. Controls cannot be the best."""
    compared = {(each.method, each.metric.name): each for each in comparisons(study, model)}
    means_of = {method: means(study.finished(model, method).values(), study.metrics) for method in study.methods}
    table = {}
    for metric in study.metrics:
        rivals = [
            by_metric[metric.name].value
            for method, by_metric in means_of.items()
            if by_metric and not study.is_control(method)
        ]
        best = (max if metric.higher_is_better else min)(rivals, default=None)
        for method in study.methods:
            mean = means_of[method].get(metric.name)
            # Methods whose printed means are equal are all marked as the best.
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
    """Format a score.

    Args:
        value: The score.
        metric: Its metric. Percentages have one decimal. Other numbers have three decimals, or four digits from 100.
        sign: Also print the sign of positive numbers.
    """
    precision = ".1f" if metric.unit == "%" else ".3f" if abs(value) < 100 else ".4g"
    text = f"{value:{'+' if sign else ''}{precision}}"
    return text.replace("-", "−")
