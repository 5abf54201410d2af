"""Model parameter randomisation: Sanity Checks for Saliency Maps.

Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim 2018, arXiv:1810.03292, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

from torch import Tensor

from camserve_server.errors import Unservable
from camserve_server.maps.similarity import hog, spearman, ssim
from camserve_server.plan import (
    Cached,
    Explainer,
    Image,
    MetricResult,
    OnHost,
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
    "Random layers of a step. cascading: all layers from the last one to those of the step. independent: only those of "
    "the step.",
]
Steps = Annotated[
    int,
    Range(1, 1000),
    "Number of steps, at most the number of layers with weights. The layers are divided evenly among the steps.",
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
    """Rank correlation with the maps of a network whose layers become random step by step, in [−1, 1].

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        order: Order in which layers become random.
        steps: Number of steps.
        seed: Seed of the random weights.
        explain: Method that made the map.

    Returns:
        The mean of Spearman's rank correlations with the map of each step, in [−1, 1]. The curve contains the
        correlations.
    """
    return _mean([step.spearman for step in (yield from _steps(x, c, S, order, steps, seed, explain))])


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
    """Structural similarity to the maps of a network whose layers become random step by step, in [−1, 1].

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        order: Order in which layers become random.
        steps: Number of steps.
        seed: Seed of the random weights.
        explain: Method that made the map.

    Returns:
        The mean of the structural similarities to the map of each step, in [−1, 1]. The curve contains the
        similarities.
    """
    return _mean([step.ssim for step in (yield from _steps(x, c, S, order, steps, seed, explain))])


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
    """Correlation of edges with the maps of a network whose layers become random step by step, in [−1, 1].

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        order: Order in which layers become random.
        steps: Number of steps.
        seed: Seed of the random weights.
        explain: Method that made the map.

    Returns:
        The mean correlation of the histograms of oriented gradients with those of the map of each step, in [−1, 1]. The
        curve contains the correlations.
    """
    return _mean([step.hog for step in (yield from _steps(x, c, S, order, steps, seed, explain))])


def _mean(curve: Sequence[float]) -> MetricResult:
    return MetricResult(sum(curve) / len(curve), tuple(curve))


def _steps(
    x: Image, c: Targets, S: Tensor, order: str, steps: int, seed: int, explain: Explainer
) -> Plan[Sequence[Similarity]]:
    """Plan of the similarities of all steps. The three metrics share it."""

    def all_steps() -> Plan[Sequence[Similarity]]:
        layers = (yield from WeightedLayers())[::-1]
        if not layers:
            raise Unservable(
                "the model has no weights that the server can make random; choose another metric",
                field="metrics",
            )
        count = min(steps, len(layers))
        bounds = [i * len(layers) // count for i in range(count + 1)]
        yield from ReleaseRows((steps - count) * explain.rows)
        similarities = []
        for i, (start, stop) in enumerate(pairwise(bounds)):
            yield from Randomise(layers[0 if order == "cascading" else start : stop], seed)
            R = yield from explain(x)
            similarity = yield from OnHost(partial(_similarity, S, R))
            similarities.append(similarity)
            yield from Report(Randomised(order, i, count, layers[start:stop], c.index[0], similarity, R))
        yield from Randomise(())
        return similarities

    return (yield from Cached(("randomisation", order, steps), steps * explain.rows, all_steps))


def _similarity(S: Tensor, R: Tensor) -> Similarity:
    """Return the similarity of two maps [H, W]. It takes about 20 ms for 224×224 pixels."""
    S, R = S.cpu(), R.cpu()
    return Similarity(spearman(S, R), ssim(S, R), hog(S, R))
