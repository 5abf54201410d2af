"""Opti-CAM: Optimizing saliency maps for interpretability (average drop, increase and gain).

Hanwei Zhang, Felipe Torres, Ronan Sicre, Yannis Avrithis, Stephane Ayache, 2024, CVIU 248:104101, arXiv:2301.07002.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Average:
    """In per cent, [0, 100]: of one image, or the mean over images."""

    drop: float
    increase: float
    gain: float


def probability(logits: Sequence[float], c: int) -> float:
    """Softmax in float64: in float32 it can be exactly 1."""
    top = max(logits)
    return math.exp(logits[c] - top) / math.fsum(math.exp(y - top) for y in logits)


def average_of_one(logits: Sequence[float], masked_logits: Sequence[float], c: int) -> Average:
    """logits of the image, masked_logits of the image times its saliency map."""
    p, o = probability(logits, c), probability(masked_logits, c)
    drop = 0.0 if p == 0 else max(p - o, 0.0) / p  # eq. 13
    gain = 0.0 if p == 1 else max(o - p, 0.0) / (1 - p)  # eq. 15
    return Average(100 * drop, 100.0 * (p < o), 100 * gain)  # eq. 14: the increase


def average(logits: Sequence[Sequence[float]], masked_logits: Sequence[Sequence[float]], c: Sequence[int]) -> Average:
    """One row an image: the means over images."""
    each = [average_of_one(y, m, k) for y, m, k in zip(logits, masked_logits, c, strict=True)]
    return Average(*(math.fsum(getattr(a, name) for a in each) / len(each) for name in ("drop", "increase", "gain")))
