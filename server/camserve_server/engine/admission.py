"""Who is let in: by the rows that would go before a request, by its caller's share, and by its deadline.

Any thread may ask. It knows rows and seconds, but no plan and no device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from camserve_server.errors import Expired, QueueFull, Unavailable

Priority = Literal["low", "normal", "high"]

# The scheduler takes a request to owe so many times its rows: it goes before longer ones of its own priority, and
# before those of a lower one that are not much shorter. Waiting makes up for it, so that nobody starves.
WEIGHTS: dict[Priority, float] = {"low": 16.0, "normal": 1.0, "high": 1 / 16}
LONGEST_RETRY_S = 60.0  # rows are not only done: requests are cut short, expire and are cancelled


@dataclass(frozen=True)
class Caller:
    """Who asks, by `name`; all who have none are one. `max_rows_owed` bounds what all its requests owe together."""

    name: str = ""
    max_rows_owed: int | None = None


@dataclass(frozen=True)
class Claim:
    """What is asked for: at most `rows`, and at the very least `least`, of which the device does `rows_per_s` at best.

    `deadline` is of `time.monotonic()`.
    """

    rows: int
    least: int = 0
    rows_per_s: float = 0.0
    deadline: float | None = None
    caller: Caller = Caller()
    priority: Priority = "normal"


@dataclass
class _Owed:
    rows: int
    caller: str
    weight: float


class Admission:
    """The rows that all requests under way still owe."""

    def __init__(self, max_rows_owed: int) -> None:
        self._max_rows_owed = max_rows_owed
        self._owed: dict[int, _Owed] = {}
        self._lock = threading.Lock()
        self._closed = False

    def admit(self, job: int, claim: Claim, rows_per_s: float) -> None:
        """Lets the job in; `rows_per_s` is how fast rows are being done, 0 if not known.

        Raises Unavailable once closed, QueueFull where too many rows would go before the job's or its caller owes too
        many already, and Expired where its deadline would pass even if everything went as fast as it can.
        """
        with self._lock:
            self._check(claim, rows_per_s)
            self._owed[job] = _Owed(claim.rows, claim.caller.name, WEIGHTS[claim.priority])

    def look(self, claim: Claim, rows_per_s: float) -> None:
        """Raises what `admit` would."""
        with self._lock:
            self._check(claim, rows_per_s)

    def _check(self, claim: Claim, rows_per_s: float) -> None:
        weight = WEIGHTS[claim.priority]
        if self._closed:
            raise Unavailable("the server is shutting down; try another one", retry_after_s=1.0)
        mine = sum(owed.rows for owed in self._owed.values() if owed.caller == claim.caller.name)
        most = claim.caller.max_rows_owed
        if most is not None and mine and mine + claim.rows > most:
            raise QueueFull(
                f"this caller owes {mine} rows, and {claim.rows} for this request; its limit is {most}",
                reason="QUOTA_EXCEEDED",
                retry_after_s=_wait_s(mine + claim.rows - most, rows_per_s),
            )
        before = _before(self._owed.values(), claim.rows, weight)
        if before and before + claim.rows > self._max_rows_owed:
            raise QueueFull(
                f"{before} rows go before the {claim.rows} of this request; the limit is {self._max_rows_owed}",
                retry_after_s=_wait_s(before + claim.rows - self._max_rows_owed, rows_per_s),
            )
        if claim.deadline is not None and claim.rows_per_s:
            before = _before(self._owed.values(), claim.least, weight)
            takes_s = (before + claim.least) / claim.rows_per_s
            left_s = max(0.0, claim.deadline - time.monotonic())
            if takes_s > left_s:
                raise Expired(
                    f"the {claim.least} rows that it takes{f' and the {before} before them' if before else ''} "
                    f"need {takes_s:.2g} s at the very least; the deadline is in {left_s:.2g} s",
                    reason="DEADLINE_UNREACHABLE",
                )

    def owe(self, job: int, rows: int) -> None:
        """The job, if it is still there, owes so many rows now."""
        with self._lock:
            if job in self._owed:
                self._owed[job].rows = rows

    def leave(self, job: int) -> None:
        """The job is done, or given up."""
        with self._lock:
            self._owed.pop(job, None)

    def close(self) -> None:
        """Lets nobody in any more."""
        with self._lock:
            self._closed = True

    def __len__(self) -> int:
        """Jobs under way."""
        return len(self._owed)

    def rows_owed(self) -> int:
        """Rows of all jobs under way."""
        with self._lock:
            return sum(owed.rows for owed in self._owed.values())


def _before(owed: Iterable[_Owed], rows: int, weight: float) -> int:
    """How many rows go before so many of that weight. Of a longer request, about as many as its own pass it by."""
    return sum(int(min(each.rows, rows * weight / each.weight)) for each in owed)


def _wait_s(rows: int, rows_per_s: float) -> float:
    return min(rows / rows_per_s if rows_per_s else 1.0, LONGEST_RETRY_S)
