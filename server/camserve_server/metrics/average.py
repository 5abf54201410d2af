"""Average drop, average increase and average gain of one image. Averages over images are up to the caller.

Drop and increase: Grad-CAM++, Chattopadhay et al. 2018, arXiv:1710.11063. Gain, the form of the equations, and the
study of the target's location: Opti-CAM, Zhang et al. 2024, arXiv:2301.07002.

p is the probability of the class for the image, and o its probability for the image masked by the map. The mask
multiplies the normalised image, so masked parts have the mean colour. Both are float64: in float32, p can be exactly 1.

The study masks the image by the target B, by the map inside the target and by the map outside the target, and computes
the same three metrics. If the model uses the target, S ∩ B scores as well as S, and S ∖ B scores badly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from camserve_server.plan import Cached, Image, MetricResult, Plan, Score, Targets, Truth
from camserve_server.registry import Sizes, metric
from camserve_server.rows import Masked, resize


def _rows(sizes: Sizes) -> int:
    return 1


def _drop(p: float, o: float) -> float:
    """Average drop, Opti-CAM eq. 13, in [0, 100]; NaN if p or o is."""
    return 0.0 if p == 0 else 100 * max(p - o, 0.0) / p


def _increase(p: float, o: float) -> float:
    """Average increase, Opti-CAM eq. 14, 0 or 100; NaN if p or o is."""
    return math.nan if math.isnan(p - o) else 100.0 * (p < o)


def _gain(p: float, o: float) -> float:
    """Average gain, Opti-CAM eq. 15, in [0, 100]; NaN if p or o is."""
    return 0.0 if p >= 1 else 100 * max(o - p, 0.0) / (1 - p)


@metric("average-drop", title="Average drop", paper="arXiv:1710.11063", rows=_rows, unit="%", higher_is_better=False)
def average_drop(x: Image, c: Targets, S: Tensor) -> Plan[MetricResult]:
    """Share of the probability lost when the map masks the image, in [0, 100] %: [p − o]₊ / p.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].

    Returns:
        The value in %, in [0, 100] (Opti-CAM, eq. 13).
    """
    p, o = yield from _probabilities("masked", x, c, S)
    return MetricResult(_drop(p, o))


@metric(
    "average-increase", title="Average increase", paper="arXiv:1710.11063", rows=_rows, unit="%", higher_is_better=True
)
def average_increase(x: Image, c: Targets, S: Tensor) -> Plan[MetricResult]:
    """100 % if the probability rises when the map masks the image, 0 % if not: 1[p < o].

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].

    Returns:
        The value in %, 0 or 100 (Opti-CAM, eq. 14).
    """
    p, o = yield from _probabilities("masked", x, c, S)
    return MetricResult(_increase(p, o))


@metric("average-gain", title="Average gain", paper="arXiv:2301.07002", rows=_rows, unit="%", higher_is_better=True)
def average_gain(x: Image, c: Targets, S: Tensor) -> Plan[MetricResult]:
    """Share of the missing probability gained when the map masks the image, in [0, 100] %: [o − p]₊ / (1 − p).

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].

    Returns:
        The value in %, in [0, 100] (Opti-CAM, eq. 15). It is 0 if p = 1.
    """
    p, o = yield from _probabilities("masked", x, c, S)
    return MetricResult(_gain(p, o))


def _probabilities(key: str, x: Image, c: Targets, mask: Tensor) -> Plan[tuple[float, float]]:
    """Plan of p, and of o under a mask [H, W]. Metrics with the same key share the row."""
    scores = yield from Cached(key, 1, lambda: iter(Score(Masked(x, mask[None], mask=resize), c)))
    return float(c.p[0]), float(scores.probabilities[0, 0])


# ---- study of the target ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """Metric of p and o."""

    name: str
    of: Callable[[float, float], float]
    summary: str
    higher_is_better: bool


@dataclass(frozen=True)
class Region:
    """Mask [H, W] made of the map S [H, W] and the target B [H, W], which is 1 inside and 0 outside."""

    name: str
    title: str
    mask: Callable[[Tensor, Tensor], Tensor]
    summary: str


MEASURES = (
    Measure("drop", _drop, "Share of the probability lost", higher_is_better=False),
    Measure("increase", _increase, "100 % if the probability rises", higher_is_better=True),
    Measure("gain", _gain, "Share of the missing probability gained", higher_is_better=True),
)
REGIONS = (
    Region("box", "Box", lambda S, B: B, "the target masks the image, independent of the map"),
    Region("inside", "Inside", lambda S, B: S * B, "the map masks the image, set to 0 outside the target"),
    Region("outside", "Outside", lambda S, B: S * (1 - B), "the map masks the image, set to 0 inside the target"),
)


def _study(region: Region, measure: Measure) -> Callable[..., Plan[MetricResult]]:
    """Return the plan function of one measure in one region."""

    def plan(x: Image, c: Targets, S: Tensor, *, truth: Truth) -> Plan[MetricResult]:
        p, o = yield from _probabilities(region.name, x, c, region.mask(S, truth.mask.to(S)))
        return MetricResult(measure.of(p, o))

    plan.__doc__ = f"{measure.summary} when {region.summary}, in [0, 100] %."
    return plan


for _region in REGIONS:
    for _measure in MEASURES:
        metric(
            f"{_region.name}-{_measure.name}",
            title=f"{_region.title} {_measure.name}",
            paper="arXiv:2301.07002",
            rows=_rows,
            unit="%",
            higher_is_better=_measure.higher_is_better,
        )(_study(_region, _measure))
