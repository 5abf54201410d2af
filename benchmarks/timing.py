"""How things are timed: a side at a time, each alone in the process, in turn."""

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
    """So many rows in so many seconds."""

    rows: int
    seconds: float


@dataclass(frozen=True)
class Rates:
    """Rows a second of one side, round by round."""

    rounds: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Rows a second."""
        return median(self.rounds)

    def over(self, other: Rates) -> float:
        """How many times faster: the median over the rounds, so that what slows one round slows both of its sides."""
        return median(mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True))


Side = Callable[[], Timed]


def alternate(sides: Mapping[str, Side], rounds: int, tick: Callable[[], None] = lambda: None) -> dict[str, Rates]:
    """Measures the sides in turn, A B C A B C …, and calls `tick` after each."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            timed = side()
            found[name].append(timed.rows / timed.seconds)
            tick()
    return {name: Rates(tuple(rates)) for name, rates in found.items()}


def alone(work: Callable[..., T], *arguments: Any) -> T:
    """Runs it in a thread that ends with it: two threads with an OpenMP team each would slow each other down.

    The main thread never does arithmetic on tensors of any size; the engine does its own on its own thread.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *arguments).result()


def clock(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
