"""What can be said of a mean over images: how sure it is, and whether two methods differ. All of it is seeded.

Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; Fisher 1935, The Design of Experiments, § 21;
Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVEL", "RESAMPLES", "SEED", "holm", "interval", "sign_flip"]

# Of confidence.
LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0

# Random numbers that are drawn at a time: 32 MiB.
_AT_ONCE = 2**22

Numbers = NDArray[np.float64]


def interval(values: Numbers) -> tuple[Numbers, Numbers]:
    """values [N] or [N, P], a row an image → the low and high ends [] or [P] of the mean's 95 % interval.

    Percentile bootstrap over images. All calls with the same N draw the same images.
    """
    count = len(values)
    random = np.random.default_rng(SEED)
    means = []
    for resamples in _parts(RESAMPLES, count):
        # How often each image is drawn: a mean of drawn images is a weighted mean of all.
        drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples)
        means.append(drawn @ values / count)
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def sign_flip(differences: Numbers) -> float:
    """differences [N] of pairs → the p-value, two-sided, of the hypothesis that each is as likely as its opposite.

    All 2^N ways to choose the signs are tried, or, where these are too many, a random sample of them to which the one
    that was seen is added.
    """
    count = len(differences)
    seen = abs(differences.sum())
    # Sums of the same numbers in another order differ in their last bits.
    least = seen - 1e-12 * np.abs(differences).sum()
    if 2**count <= RESAMPLES:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        return float(np.mean(np.abs((1 - 2 * bits) @ differences) >= least))
    random = np.random.default_rng(SEED)
    reached = 0
    for resamples in _parts(RESAMPLES, count):
        signs = 1 - 2 * random.integers(0, 2, (resamples, count), dtype=np.int8)
        reached += int(np.sum(np.abs(signs @ differences) >= least))
    return (reached + 1) / (RESAMPLES + 1)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several hypotheses → those that may be compared with a level as if there were but one."""
    adjusted = [0.0] * len(p)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def _parts(resamples: int, count: int) -> list[int]:
    """So many at a time."""
    most = max(1, _AT_ONCE // max(1, count))
    full, rest = divmod(resamples, most)
    return [most] * full + [rest] * (rest > 0)
