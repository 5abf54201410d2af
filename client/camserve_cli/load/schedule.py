"""Intended send times of an open loop, in seconds from the start. The module has no clock."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["constant", "poisson"]

Seconds = NDArray[np.float64]


def poisson(rate: float, seconds: float, seed: int) -> Seconds:
    """Return the times of a Poisson process, which models many independent callers.

    Args:
        rate: Mean number of requests per second.
        seconds: All times are below this duration.
        seed: The same seed gives the same times.
    """
    random = np.random.default_rng([seed, 0])
    times = np.empty(0)
    while not times.size or times[-1] < seconds:
        gaps = random.exponential(1 / rate, math.ceil(rate * seconds) + 16)
        times = np.append(times, (times[-1] if times.size else 0) + np.cumsum(gaps))
    return times[times < seconds]


def constant(rate: float, seconds: float) -> Seconds:
    """Return times at equal intervals. The first is 0, and all are below `seconds`."""
    return np.arange(math.ceil(rate * seconds - 1e-9)) / rate
