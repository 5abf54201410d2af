"""Runs batches whatever happens: what fails together is run part by part, what does not fit into memory in halves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from camserve_server.engine.lanes.dispatch import Lane, Part, run
from camserve_server.errors import OutOfMemory
from camserve_server.models.model import LaneKind, Model

IN_FLIGHT = 2  # batches that a GPU has been given and not done: enough to be never idle, and a cancel waits for no more


class Runner:
    """Runs batches of one device, each padded to its lane's size unless `padded` is false.

    `halved(model, kind, size)` is called when batches of that kind have become smaller, for good.
    """

    def __init__(self, *, padded: bool, halved: Callable[[Model, LaneKind, int], None]) -> None:
        self._padded = padded
        self._halved = halved
        self._fits: dict[tuple[str, LaneKind], int] = {}  # largest batch, once memory has run out
        self._given: deque[torch.cuda.Event] = deque()

    def fitting(self, lane: str, kind: LaneKind, size: int) -> int:
        """`size` rows, or as many as have been found to fit."""
        return min(size, self._fits.get((lane, kind), size))

    def size(self, lane: Lane) -> int:
        """How many rows a batch of the lane has."""
        return self.fitting(lane.model, lane.kind, lane.size)

    def padding(self, lane: Lane, rows: int) -> int:
        """How many rows of nothing a batch has beside so many."""
        return max(0, self.size(lane) - rows) if self._padded else 0

    def run(self, model: Model, lane: Lane, parts: list[Part]) -> dict[int, Exception]:
        """Runs the parts together; if that fails, each alone. Returns the failures by the part's id."""
        try:
            self._run(model, lane, parts)
            self._wait(model.device)
            return {}
        except Exception as error:
            if len(parts) == 1:
                return {id(parts[0]): error}
        failures: dict[int, Exception] = {}
        for part in parts:
            failures |= self.run(model, lane, [part])
        return failures

    def _wait(self, device: torch.device) -> None:
        """Until a GPU has done all batches but the last few."""
        if device.type == "cuda":
            self._given.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            self._given[-1].record(torch.cuda.current_stream(device))
            if len(self._given) > IN_FLIGHT:
                self._given.popleft().synchronize()

    def _run(self, model: Model, lane: Lane, parts: list[Part]) -> None:
        """Runs the parts as one batch or, where that does not fit into memory, as halves of it."""
        size = self.size(lane) if self._padded else sum(part.stop - part.start for part in parts)
        try:
            run(model, lane, parts, size)
        except torch.OutOfMemoryError:
            pass  # what comes next waits for its traceback to go, which holds the batch that did not fit
        else:
            return
        if size == 1:
            raise OutOfMemory(f"one row of {model.name} does not fit into the device's memory")
        model.bare = None  # a graph has memory of its own
        torch.cuda.empty_cache()
        self._fits[lane.model, lane.kind] = size // 2
        self._halved(model, lane.kind, size // 2)
        for chunk in _chunks(parts, size // 2):
            self._run(model, lane, chunk)


def _chunks(parts: list[Part], size: int) -> list[list[Part]]:
    """The same rows, cut into batches of at most `size`."""
    chunks: list[list[Part]] = [[]]
    room = size
    for part in parts:
        start = part.start
        while start < part.stop:
            if not room:
                chunks.append([])
                room = size
            stop = min(part.stop, start + room)
            chunks[-1].append(Part(part.work, start, stop))
            room -= stop - start
            start = stop
    return chunks
