"""Average drop, average increase and average gain, per image; their averages are taken over images.

Drop and increase: Grad-CAM++, Chattopadhay et al. 2018, arXiv:1710.11063. Gain, and the equations' form: Opti-CAM,
Zhang et al. 2024, arXiv:2301.07002.

p is the class's probability on the image, o on the image masked by the map: the normalised image, so that what is
masked out has the mean colour. Both are float64: in float32 p can be exactly 1.
"""

from __future__ import annotations

from torch import Tensor

from camserve_server.plan import Image, Measured, Once, Plan, Score, Targets
from camserve_server.registry import Sizes, metric
from camserve_server.rows import Masked, up


def _rows(sizes: Sizes) -> int:
    return 1


@metric("average-drop", title="Average drop", paper="arXiv:1710.11063", rows=_rows, unit="%", higher_is_better=False)
def average_drop(x: Image, c: Targets, S: Tensor) -> Plan[Measured]:
    """Share of the probability lost when the map masks the image, in [0, 100] %: [p − o]₊ / p.

    x [3, H, W], one class, S [H, W] in [0, 1]. Opti-CAM, eq. 13.
    """
    p, o = yield from _probabilities(x, c, S)
    return Measured(100 * max(p - o, 0.0) / p if p > 0 else 0.0)


@metric(
    "average-increase", title="Average increase", paper="arXiv:1710.11063", rows=_rows, unit="%", higher_is_better=True
)
def average_increase(x: Image, c: Targets, S: Tensor) -> Plan[Measured]:
    """100 % where the probability rises when the map masks the image, 0 % elsewhere: 1[p < o].

    x [3, H, W], one class, S [H, W] in [0, 1]. Opti-CAM, eq. 14.
    """
    p, o = yield from _probabilities(x, c, S)
    return Measured(100.0 * (p < o))


@metric("average-gain", title="Average gain", paper="arXiv:2301.07002", rows=_rows, unit="%", higher_is_better=True)
def average_gain(x: Image, c: Targets, S: Tensor) -> Plan[Measured]:
    """Share of the probability that was missing and is gained when the map masks the image, in [0, 100] %.

    [o − p]₊ / (1 − p), and 0 where p = 1. x [3, H, W], one class, S [H, W] in [0, 1]. Opti-CAM, eq. 15.
    """
    p, o = yield from _probabilities(x, c, S)
    return Measured(100 * max(o - p, 0.0) / (1 - p) if p < 1 else 0.0)


def _probabilities(x: Image, c: Targets, S: Tensor) -> Plan[tuple[float, float]]:
    scores = yield from Once("masked", 1, lambda: iter(Score(Masked(x, S[None], mask=up), c)))
    return float(c.p[0]), float(scores.probabilities[0, 0])
