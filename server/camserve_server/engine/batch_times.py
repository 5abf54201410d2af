"""Durations of recent batches, from which the engine predicts how long rows will take."""

from __future__ import annotations

import time
from collections.abc import Collection

from camserve_server.engine.lanes.dispatch import Lane
from camserve_server.models.model import LaneKind


class BatchTimes:
    """The rate of an engine and the longest recent batch of each model and kind of lane.

    Attributes:
        rows_per_s: A moving average of the rows that run each second, with the time that plans take between batches;
            0 before the first batch.
    """

    def __init__(self) -> None:
        self.rows_per_s = 0.0
        self._busy_since: float | None = None  # the end of the last batch, or None if no row waited then
        self._longest_s: dict[tuple[str, LaneKind], float] = {}

    def add(self, lane: Lane, rows: int, started: float, finished: float) -> float:
        """Add a batch of `rows` rows. Times are on the clock of `time.monotonic()`.

        Returns:
            The seconds since the end of the previous batch, or since the start of this one if no row waited then.
        """
        key = (lane.model, lane.kind)
        self._longest_s[key] = max(finished - started, 0.9 * self._longest_s.get(key, 0.0))
        seconds = max(finished - (self._busy_since or started), 1e-9)
        rate = rows / seconds
        self._busy_since = finished
        self.rows_per_s = 0.9 * (self.rows_per_s or rate) + 0.1 * rate
        return seconds

    @property
    def busy(self) -> bool:
        """True if rows waited when the last batch ended."""
        return self._busy_since is not None

    def idle(self) -> None:
        """Note that no row waits, so that the time until the next batch does not count."""
        self._busy_since = None

    def next_end(self, lanes: Collection[Lane]) -> float:
        """Return the latest expected end of the next batch if it belongs to one of these lanes."""
        longest_s = (self._longest_s.get((lane.model, lane.kind), 0.0) for lane in lanes)
        return time.monotonic() + max(longest_s, default=0.0)
