"""Search for the knee: the highest request rate whose 99th percentile of latency stays within a bound.

The module has no clock and sends nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from camserve_cli.load.stats import Measurement, Record, Summary

__all__ = ["MAX_RATE", "TOLERANCE", "BoundMonitor", "Step", "best_step", "candidate_rates"]

# The search ends when the highest rate that met the bound and the lowest that missed it differ by at most this share.
TOLERANCE = 0.05
# Requests per second. One process cannot send faster, on any machine.
MAX_RATE = 10_000.0


@dataclass(frozen=True)
class Step:
    """Result of one rate of the search.

    Attributes:
        rate: Requests per second.
        met: True if the 99th percentile stayed within the bound.
        dropped: True if the measurement ended early because the rate could no longer meet the bound.
        measured: The recorded requests.
    """

    rate: float
    met: bool
    dropped: bool
    measured: Measurement

    @functools.cached_property
    def summary(self) -> Summary:
        """Summary of the requests of all methods."""
        return self.measured.summary()


def candidate_rates(first: float, least: float, most: float = MAX_RATE) -> Generator[float, bool, None]:
    """Yield the rates to try.

    The rate doubles until it misses the bound, or halves until it meets the bound. Then the search bisects the gap
    geometrically until it is within `TOLERANCE`.

    Args:
        first: The first rate, in requests per second.
        least: The lowest rate. The search ends there if no rate meets the bound.
        most: The highest rate. The search ends there if every rate meets the bound.

    Yields:
        The next rate. Send back True if that rate met the bound.
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


def best_step(steps: Iterable[Step]) -> Step | None:
    """Return the step with the highest rate that met the bound, or None if no rate met it."""
    return max((step for step in steps if step.met), key=lambda step: step.rate, default=None)


class BoundMonitor:
    """Check that the 99th percentile of latency of a running measurement can still be within a bound.

    A request that fails counts as slower than the bound. A pending request does once it has waited longer than the
    bound.
    """

    def __init__(self, bound_s: float, requests: int, seconds: float) -> None:
        """Set the bound.

        Args:
            bound_s: Bound of the 99th percentile of latency, in seconds.
            requests: Number of requests that the measurement will send.
            seconds: Duration of the measurement without its warm-up.
        """
        self._bound_s, self._seconds = bound_s, seconds
        self._allowed = requests // 100
        self._seen = self._over = 0

    def missed(self, records: Sequence[Record], pending: Iterable[float] = (), now_s: float = 0) -> bool:
        """Return True if the bound can no longer be met.

        Args:
            records: The finished requests. Each call must pass the same list, to which records may have been added.
            pending: The intended send times of the pending requests, in seconds.
            now_s: The current time, in seconds from the end of the warm-up.
        """
        for each in records[self._seen :]:
            slow = not each.answered or each.latency_s > self._bound_s
            self._over += self._is_measured(each.intended_s) and slow
        self._seen = len(records)
        late = sum(self._is_measured(intended_s) and now_s - intended_s > self._bound_s for intended_s in pending)
        return self._over + late > self._allowed

    def _is_measured(self, intended_s: float) -> bool:
        return 0 <= intended_s < self._seconds
