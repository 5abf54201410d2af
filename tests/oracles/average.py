"""Opti-CAM: Optimizing saliency maps for interpretability (average drop, increase and gain).

Hanwei Zhang, Felipe Torres, Ronan Sicre, Yannis Avrithis, Stephane Ayache, 2024, CVIU 248:104101, arXiv:2301.07002.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Average:
    """Average drop, increase and gain in per cent, in [0, 100], of one image or averaged over images."""

    drop: float
    increase: float
    gain: float


def probability(logits: Sequence[float], c: int) -> float:
    """Return the softmax probability in float64. In float32 it can be exactly 1."""
    top = max(logits)
    return math.exp(logits[c] - top) / math.fsum(math.exp(y - top) for y in logits)


def average_of_one(logits: Sequence[float], masked_logits: Sequence[float], c: int) -> Average:
    """Return the metrics of one image from its logits and the logits of the image times its saliency map."""
    p, o = probability(logits, c), probability(masked_logits, c)
    drop = 0.0 if p == 0 else max(p - o, 0.0) / p  # eq. 13
    gain = 0.0 if p == 1 else max(o - p, 0.0) / (1 - p)  # eq. 15
    return Average(100 * drop, 100.0 * (p < o), 100 * gain)  # The increase is eq. 14.


def average(logits: Sequence[Sequence[float]], masked_logits: Sequence[Sequence[float]], c: Sequence[int]) -> Average:
    """Return the means over images. Each row of the arguments belongs to one image."""
    each = [average_of_one(y, m, k) for y, m, k in zip(logits, masked_logits, c, strict=True)]
    return Average(*(math.fsum(getattr(a, name) for a in each) / len(each) for name in ("drop", "increase", "gain")))
