"""Timing: the sides of a comparison are measured alternately, one at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Timed:
    """Number of rows and their duration in seconds."""

    rows: int
    seconds: float


@dataclass(frozen=True)
class Rates:
    """Rates of one side in rows per second, one for each round."""

    rounds: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Median rate in rows per second."""
        return median(self.rounds)

    def over(self, other: Rates) -> float:
        """Return the median over the rounds of this rate divided by the other one.

        Within a round, both sides are affected alike if the machine slows down.
        """
        return median(mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True))


Side = Callable[[], Timed]


def alternate(sides: Mapping[str, Side], rounds: int, tick: Callable[[], None] = lambda: None) -> dict[str, Rates]:
    """Measure the sides in the order A B C A B C … and call `tick` after each measurement."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            timed = side()
            rates[name].append(timed.rows / timed.seconds)
            tick()
    return {name: Rates(tuple(rates)) for name, rates in rates.items()}


def run_on_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Run a function on a new thread that ends with it, and return its result.

    Each thread that uses tensors keeps an OpenMP team, and two teams slow each other down. Therefore the main thread
    never computes with large tensors.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *arguments).result()


def clock(device: torch.device) -> float:
    """Wait until the device is idle and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
