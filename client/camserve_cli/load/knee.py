"""The knee: the highest rate at which the 99th percentile of latency stays within a bound; pure."""

from __future__ import annotations

import functools
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from camserve_cli.load.stats import Measured, Record, Summary

__all__ = ["MOST_RATE", "TOLERANCE", "Step", "Watch", "highest", "rates"]

# The knee is found to this share of itself.
TOLERANCE = 0.05
# One process sends no faster, whatever the machine.
MOST_RATE = 10_000.0


@dataclass(frozen=True)
class Step:
    """A rate that was tried, and whether it `met` the bound. One that was `dropped` could not meet it any more."""

    rate: float
    met: bool
    dropped: bool
    measured: Measured

    @functools.cached_property
    def summary(self) -> Summary:
        """Of all methods."""
        return self.measured.summary()


def rates(first: float, least: float, most: float = MOST_RATE) -> Generator[float, bool, None]:
    """The rates to be tried; each takes whether it met the bound.

    Doubled until the bound is missed, or halved until it is met; then the gap is halved, in proportion, until it is
    within the tolerance. Ends at `least` where the bound is never met, and at `most` where it always is.
    """
    met, missed = 0.0, math.inf
    rate = min(max(first, least), most)
    while True:
        if (yield rate):
            met = rate
        else:
            missed = rate
        if not met:
            if rate <= least:
                return
            rate = max(least, rate / 2)
        elif missed == math.inf:
            if rate >= most:
                return
            rate = min(most, 2 * rate)
        elif missed <= met * (1 + TOLERANCE):
            return
        else:
            rate = math.sqrt(met * missed)


def highest(steps: Iterable[Step]) -> Step | None:
    """Of those that met the bound; None where none did."""
    return max((step for step in steps if step.met), key=lambda step: step.rate, default=None)


class Watch:
    """Says whether the 99th percentile of `requests`, so many seconds of them, can still be within the bound.

    All that are not answered are over it, however they failed; those on the way are once they have waited for as long.
    """

    def __init__(self, bound_s: float, requests: int, seconds: float) -> None:
        self._bound_s, self._seconds = bound_s, seconds
        self._allowed = requests // 100
        self._seen = self._over = 0

    def missed(self, records: Sequence[Record], pending: Iterable[float] = (), now_s: float = 0) -> bool:
        """`records` are the same list, longer from call to call; `pending` is when those on the way were meant."""
        for each in records[self._seen :]:
            slow = not each.answered or each.latency_s > self._bound_s
            self._over += self._counts(each.intended_s) and slow
        self._seen = len(records)
        late = sum(self._counts(intended_s) and now_s - intended_s > self._bound_s for intended_s in pending)
        return self._over + late > self._allowed

    def _counts(self, intended_s: float) -> bool:
        return 0 <= intended_s < self._seconds
