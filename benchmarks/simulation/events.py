"""Simulated time: a clock and the events that advance it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Timeline:
    """Events in the order of their times. Nothing waits for real time.

    Attributes:
        now: Simulated time in seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._added = 0  # events of the same time happen in the order in which they were added

    def clock(self) -> float:
        """Return the simulated time in seconds."""
        return self.now

    def at(self, time: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action` at a time. A time in the past stands for the current time."""
        self._added += 1
        heapq.heappush(self._events, (max(time, self.now), self._added, action, arguments))

    def run(self) -> None:
        """Run all events until none is left."""
        while self._events:
            self.now, _, action, arguments = heapq.heappop(self._events)
            action(*arguments)
