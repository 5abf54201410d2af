"""Model parameter randomisation: Sanity Checks for Saliency Maps.

Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim 2018, arXiv:1810.03292, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from torch import Tensor

from camserve_server.maps.similarity import hog, spearman, ssim
from camserve_server.plan import (
    Cached,
    Explainer,
    Image,
    MetricResult,
    Plan,
    Randomise,
    Randomised,
    ReleaseRows,
    Report,
    Similarity,
    Targets,
    WeightedLayers,
)
from camserve_server.registry import Range, Sizes, metric

Order = Annotated[
    Literal["cascading", "independent"],
    "cascading: all layers from the last one to that of the step; independent: those of the step alone",
]
Steps = Annotated[
    int, Range(1, 1000), "steps, to which the layers with weights are dealt out evenly; no more than layers"
]


def _rows(sizes: Sizes, *, steps: int = 10, **_: object) -> int:
    return steps * sizes.rows_per_map


@metric(
    "randomisation-spearman",
    title="Randomisation, rank correlation",
    paper="arXiv:1810.03292",
    rows=_rows,
    higher_is_better=False,
)
def randomisation_spearman(
    x: Image, c: Targets, S: Tensor, *, order: Order = "cascading", steps: Steps = 10, seed: int, explain: Explainer
) -> Plan[MetricResult]:
    """How much of the order of the map's pixels is left as the network's layers become random, in [−1, 1].

    x [3, H, W], one class, S [H, W] in [0, 1]. Spearman's rank correlation with the map of each step; their mean.
    """
    return _measured([step.spearman for step in (yield from _steps(x, c, S, order, steps, seed, explain))])


@metric(
    "randomisation-ssim",
    title="Randomisation, structural similarity",
    paper="arXiv:1810.03292",
    rows=_rows,
    higher_is_better=False,
)
def randomisation_ssim(
    x: Image, c: Targets, S: Tensor, *, order: Order = "cascading", steps: Steps = 10, seed: int, explain: Explainer
) -> Plan[MetricResult]:
    """How much of the map's local structure is left as the network's layers become random, in [−1, 1].

    x [3, H, W], one class, S [H, W] in [0, 1]. The structural similarity to the map of each step; their mean.
    """
    return _measured([step.ssim for step in (yield from _steps(x, c, S, order, steps, seed, explain))])


@metric(
    "randomisation-hog",
    title="Randomisation, oriented gradients",
    paper="arXiv:1810.03292",
    rows=_rows,
    higher_is_better=False,
)
def randomisation_hog(
    x: Image, c: Targets, S: Tensor, *, order: Order = "cascading", steps: Steps = 10, seed: int, explain: Explainer
) -> Plan[MetricResult]:
    """How much of the map's edges is left as the network's layers become random, in [−1, 1].

    x [3, H, W], one class, S [H, W] in [0, 1]. Correlation of its histograms of oriented gradients with those of each
    step's map; their mean.
    """
    return _measured([step.hog for step in (yield from _steps(x, c, S, order, steps, seed, explain))])


def _measured(curve: Sequence[float]) -> MetricResult:
    return MetricResult(sum(curve) / len(curve), tuple(curve))


def _steps(
    x: Image, c: Targets, S: Tensor, order: str, steps: int, seed: int, explain: Explainer
) -> Plan[Sequence[Similarity]]:
    """What the three metrics share."""

    def compared() -> Plan[Sequence[Similarity]]:
        layers = (yield from WeightedLayers())[::-1]
        count = min(steps, len(layers))
        bounds = [i * len(layers) // count for i in range(count + 1)]
        yield from ReleaseRows((steps - count) * explain.rows)
        found = []
        for i, (start, stop) in enumerate(pairwise(bounds)):
            yield from Randomise(layers[0 if order == "cascading" else start : stop], seed)
            R = yield from explain(x)
            alike = Similarity(spearman(S, R), ssim(S, R), hog(S, R))
            found.append(alike)
            yield from Report(Randomised(order, i, count, layers[start:stop], c.index[0], alike, R))
        yield from Randomise(())
        return found

    return (yield from Cached(("randomisation", order, steps), steps * explain.rows, compared))
