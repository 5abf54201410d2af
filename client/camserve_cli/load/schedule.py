"""When requests are meant to be sent, in seconds from the start; pure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["constant", "poisson"]

Seconds = NDArray[np.float64]


def poisson(rate: float, seconds: float, seed: int) -> Seconds:
    """So many a second on average, independent of each other, as many callers are who do not know of one another."""
    chance = np.random.default_rng([seed, 0])
    times = np.empty(0)
    while not times.size or times[-1] < seconds:
        gaps = chance.exponential(1 / rate, math.ceil(rate * seconds) + 16)
        times = np.append(times, (times[-1] if times.size else 0) + np.cumsum(gaps))
    return times[times < seconds]


def constant(rate: float, seconds: float) -> Seconds:
    """So many a second, evenly, the first at once."""
    return np.arange(math.ceil(rate * seconds - 1e-9)) / rate
