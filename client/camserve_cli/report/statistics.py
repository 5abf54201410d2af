"""Confidence intervals and significance tests of means over images, with fixed seeds.

Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; Fisher 1935, The Design of Experiments, § 21;
Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVEL", "RESAMPLES", "SEED", "holm", "interval", "sign_flip"]

# Confidence level of the intervals.
LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0

# Number of random numbers that are drawn at a time. They need 32 MiB.
_AT_ONCE = 2**22

Numbers = NDArray[np.float64]


def interval(values: Numbers) -> tuple[Numbers, Numbers]:
    """Return the 95 % confidence interval of the mean, by the percentile bootstrap over images.

    Args:
        values: One row for each of N images, [N] or [N, P]. All calls with the same N draw the same images.

    Returns:
        The lower and the upper end, [] or [P] each.
    """
    count = len(values)
    random = np.random.default_rng(SEED)
    means = []
    for resamples in _parts(RESAMPLES, count):
        # The mean of the drawn images is the mean of all images, weighted by the number of draws.
        drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples)
        means.append(drawn @ values / count)
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def sign_flip(differences: Numbers) -> float:
    """Return the two-sided p-value of the sign-flip test of paired differences.

    The hypothesis is that each difference is as likely as its opposite. The test uses all 2^N choices of the signs. If
    there are more than `RESAMPLES`, it uses that many random choices and the observed one.

    Args:
        differences: Differences of N pairs, [N].
    """
    count = len(differences)
    observed = abs(differences.sum())
    # The tolerance is for rounding: sums of the same numbers in another order differ in their last bits.
    threshold = observed - 1e-12 * np.abs(differences).sum()
    if 2**count <= RESAMPLES:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        return float(np.mean(np.abs((1 - 2 * bits) @ differences) >= threshold))
    random = np.random.default_rng(SEED)
    reached = 0
    for resamples in _parts(RESAMPLES, count):
        signs = 1 - 2 * random.integers(0, 2, (resamples, count), dtype=np.int8)
        reached += int(np.sum(np.abs(signs @ differences) >= threshold))
    return (reached + 1) / (RESAMPLES + 1)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust the p-values of several hypotheses by Holm's method.

    Args:
        p: The p-values.

    Returns:
        The adjusted p-values, which can be compared with the significance level of a single hypothesis.
    """
    adjusted = [0.0] * len(p)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def _parts(resamples: int, count: int) -> list[int]:
    """Divide the resamples into parts that need at most `_AT_ONCE` random numbers."""
    most = max(1, _AT_ONCE // max(1, count))
    full, rest = divmod(resamples, most)
    return [most] * full + [rest] * (rest > 0)
