"""The throughput of a model, observed on its batches."""

from __future__ import annotations

import time

WINDOW_S = 60.0


class Throughput:
    """Rows per second of one kind of lane, observed on batches while they run.

    One thread adds observations. Any thread may read.

    Attributes:
        average: Moving average in rows per second; 0 before the first observation.
    """

    def __init__(self) -> None:
        self.average = 0.0
        self._window = -2 * WINDOW_S, 0.0, 0.0  # its start, its best rate, and the best rate of the window before it

    def observe(self, rows: int, seconds: float, now: float | None = None) -> None:
        """Add a batch.

        Args:
            rows: Rows of the batch, padding included.
            seconds: Time of the batch.
            now: Time of the observation, by default the current one, on the clock of `time.monotonic()`.
        """
        now = time.monotonic() if now is None else now
        rate = rows / max(seconds, 1e-9)
        self.average = 0.9 * (self.average or rate) + 0.1 * rate
        started, best, previous = self._window
        if now - started >= WINDOW_S:
            started, best, previous = now, 0.0, best if now - started < 2 * WINDOW_S else 0.0
        self._window = started, max(best, rate), previous

    def best(self, now: float | None = None) -> float:
        """Return the highest rate of the last one to two minutes in rows per second.

        Without an observation in that time, the rate is unknown and the result is 0. A rate that was measured while
        other processes used the machine is therefore forgotten.

        Args:
            now: As in `observe`.
        """
        now = time.monotonic() if now is None else now
        started, best, previous = self._window
        age = now - started
        if age >= 2 * WINDOW_S:
            return 0.0
        return best if age >= WINDOW_S else max(best, previous)
