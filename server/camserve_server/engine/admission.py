"""Admission control: accept or refuse a request by its rows, by the quota of its caller and by its deadline.

The module counts rows and seconds. It does not know plans, and knows devices by name only. Any thread may call it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from camserve_server.errors import Expired, QueueFull, Unavailable

Priority = Literal["low", "normal", "high"]

# The scheduler multiplies the rows that a request owes by the weight of its priority. A request runs before longer
# requests of the same priority, and before requests of a lower priority unless they are much shorter. Ageing in the
# scheduler prevents starvation.
WEIGHTS: dict[Priority, float] = {"low": 16.0, "normal": 1.0, "high": 1 / 16}
LONGEST_RETRY_S = 60.0  # owed rows also disappear when requests stop early, expire or are cancelled


@dataclass(frozen=True)
class Caller:
    """The sender of a request. Unnamed callers share one quota.

    Attributes:
        name: The name of the token or of the client certificate; empty for an unnamed caller.
        max_rows_owed: The limit of the rows that all requests of this caller owe together; None for no limit.
    """

    name: str = ""
    max_rows_owed: int | None = None


@dataclass(frozen=True)
class Claim:
    """The resources that a request asks for.

    Attributes:
        rows: The most rows that the request can take.
        least: The fewest rows with which the request can be answered.
        rows_per_s: The highest recent rate of the model; 0 if it is unknown.
        deadline: The latest time of the answer, on the clock of the admission.
        caller: The sender of the request.
        priority: The priority that the scheduler applies.
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
    device: str


class Admission:
    """The rows that all admitted requests still owe, on one or several devices.

    The limit of rows and the quotas apply to all devices together. A deadline depends on the device of the request.

    Args:
        max_rows_owed: A request is refused if its rows and the rows that run before them exceed this limit.
        clock: Returns the current time in seconds; None for `time.monotonic`. The deadlines of claims are times on this
            clock.
    """

    def __init__(self, max_rows_owed: int, clock: Callable[[], float] | None = None) -> None:
        self._max_rows_owed = max_rows_owed
        self._clock = clock or time.monotonic
        self._owed: dict[int, _Owed] = {}
        self._lock = threading.Lock()
        self._rows_per_s: dict[str, float] = {}  # of each device, when it was last asked for
        self._closed: set[str] = set()

    def admit(self, request: int, claim: Claim, rows_per_s: float, device: str = "") -> None:
        """Admit a request and count its rows as owed.

        Args:
            request: The identifier that later calls use.
            claim: The resources that the request asks for.
            rows_per_s: The current rate of the device; 0 if it is unknown.
            device: The name of the device that the request goes to.

        Raises:
            Unavailable: The device has failed, or the server is shutting down.
            QueueFull: Too many rows run before this request, or its caller already owes too many.
            Expired: The deadline would pass even if every row ran at the best rate.
        """
        with self._lock:
            self._check(claim, rows_per_s, device)
            self._owed[request] = _Owed(claim.rows, claim.caller.name, WEIGHTS[claim.priority], device)

    def _check(self, claim: Claim, rows_per_s: float, device: str) -> None:
        weight = WEIGHTS[claim.priority]
        if device in self._closed:
            if device:
                message = f"{device} has failed, or the server is shutting down; try again"
            else:
                message = "the server is shutting down; try another one"
            raise Unavailable(message, retry_after_s=1.0)
        self._rows_per_s[device] = rows_per_s
        rows_per_s = sum(self._rows_per_s.values())  # all devices work on the rows that a refused request waits for
        quota = claim.caller.max_rows_owed
        if quota is not None:
            callers_rows = sum(owed.rows for owed in self._owed.values() if owed.caller == claim.caller.name)
            if callers_rows and callers_rows + claim.rows > quota:
                raise QueueFull(
                    f"this caller owes {callers_rows} rows, and this request needs {claim.rows} more; the caller's "
                    f"limit is {quota} rows; wait for its other requests",
                    reason="QUOTA_EXCEEDED",
                    retry_after_s=_wait_s(callers_rows + claim.rows - quota, rows_per_s),
                )
        rows_before = _rows_before(self._owed.values(), claim.rows, weight)
        if rows_before and rows_before + claim.rows > self._max_rows_owed:
            raise QueueFull(
                f"this request and the rows before it are {rows_before + claim.rows} rows; max_rows_owed is "
                f"{self._max_rows_owed}; try again later",
                retry_after_s=_wait_s(rows_before + claim.rows - self._max_rows_owed, rows_per_s),
            )
        if claim.deadline is not None and claim.rows_per_s:
            same_device = (owed for owed in self._owed.values() if owed.device == device)
            rows_before = _rows_before(same_device, claim.least, weight)
            least_s = (rows_before + claim.least) / claim.rows_per_s
            left_s = max(0.0, claim.deadline - self._clock())
            if least_s > left_s:
                rows = f"this request needs {claim.least} rows"
                if rows_before:
                    rows += f" and {rows_before} rows run before them"
                raise Expired(
                    f"{rows}; that takes at least {_seconds(least_s)} s, but the deadline is in {_seconds(left_s)} s; "
                    "allow more time or request fewer rows",
                    reason="DEADLINE_UNREACHABLE",
                    retry_after_s=min(max(least_s - left_s, 0.1), LONGEST_RETRY_S),
                )

    def set_rows_owed(self, request: int, rows: int) -> None:
        """Set the rows that an admitted request still owes; do nothing after its release."""
        with self._lock:
            if request in self._owed:
                self._owed[request].rows = rows

    def release(self, request: int) -> None:
        """Forget a request that has ended; do nothing if it has been released before."""
        with self._lock:
            self._owed.pop(request, None)

    def close(self, device: str = "") -> None:
        """Refuse every request for a device from now on."""
        with self._lock:
            self._closed.add(device)
            self._rows_per_s.pop(device, None)

    def __len__(self) -> int:
        """Return the number of admitted requests that have not been released."""
        return len(self._owed)

    def rows_owed(self, device: str = "") -> int:
        """Return the rows that all admitted requests for a device owe together."""
        with self._lock:
            return sum(owed.rows for owed in self._owed.values() if owed.device == device)

    def seconds_owed(self, rows_per_s: float, device: str = "") -> float:
        """Return the seconds that all owed rows of a device need, at most `LONGEST_RETRY_S`.

        Args:
            rows_per_s: The current rate of the device; 0 if it is unknown.
            device: The name of the device.
        """
        rows = self.rows_owed(device)
        return _wait_s(rows, rows_per_s) if rows else 0.0


def _rows_before(owed: Iterable[_Owed], rows: int, weight: float) -> int:
    """Return how many owed rows the scheduler runs before a request of `rows` rows and this weight.

    A longer request runs about as many rows as the new one before the new one overtakes it.
    """
    return sum(int(min(each.rows, rows * weight / each.weight)) for each in owed)


def _wait_s(rows: int, rows_per_s: float) -> float:
    return min(rows / rows_per_s if rows_per_s else 1.0, LONGEST_RETRY_S)


def _seconds(value: float) -> str:
    """Return seconds with one decimal below ten, and without an exponent."""
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
