"""Batches of one device, with recovery from failures and from lack of memory.

A batch that fails is run again slice by slice, so that a failure affects one request only, unless the failure does not
depend on the rows. A batch that does not fit into memory is run in halves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch

from camserve_server.engine.lanes.ascend import forget_slots
from camserve_server.engine.lanes.cuda_graph import empty_cache
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane, run_batch
from camserve_server.engine.lanes.fast_forward import forget_recording
from camserve_server.engine.lanes.smaller_batches import batch_size_for, full_linear_layers
from camserve_server.errors import OF_WHOLE_BATCH, OutOfMemory
from camserve_server.models.model import LaneKind, Model

# Batches that a GPU has received and not finished. Two keep it busy, and a cancellation waits for no more than them.
IN_FLIGHT = 2


class BatchRunner:
    """Runs the batches of one device. All methods belong to the engine's thread.

    Args:
        padded: Fill each batch up to its lane's size with padding rows.
        on_halved: Callback `(model, kind, size)`, called when the batches of a model and lane kind have permanently
            become smaller because memory has run out.

    Attributes:
        padded: Batches have padding rows.
    """

    def __init__(self, *, padded: bool, on_halved: Callable[[Model, LaneKind, int], None]) -> None:
        self.padded = padded
        self._on_halved = on_halved
        self._largest: dict[tuple[str, LaneKind], int] = {}  # largest batch that fits, once memory has run out
        self._in_flight: deque[torch.cuda.Event] = deque()

    def fitting_size(self, lane_key: str, kind: LaneKind, size: int) -> int:
        """Return `size`, or the largest number of rows that fits into memory if that is smaller.

        Args:
            lane_key: Lane key of the model (`Model.lane_key`).
            kind: Kind of lane.
            size: Requested batch size in rows.
        """
        return min(size, self._largest.get((lane_key, kind), size))

    def batch_size(self, lane: Lane) -> int:
        """Return the number of rows of a full batch of the lane."""
        return self.fitting_size(lane.model, lane.kind, lane.size)

    def padding_rows(self, model: Model, lane: Lane, rows: int) -> int:
        """Return the number of padding rows in a batch with `rows` real rows."""
        return max(0, self._size(model, lane, rows) - rows)

    def _size(self, model: Model, lane: Lane, rows: int) -> int:
        """Return the number of rows of a batch with `rows` real rows."""
        if not self.padded:
            return rows
        full = self.batch_size(lane)
        return full if lane.fast_forward else batch_size_for(model.equal_sizes.get(lane.passes, ()), full, rows)

    def run(self, model: Model, lane: Lane, slices: list[BatchSlice]) -> dict[int, Exception]:
        """Run the slices as one batch; if that fails because of a slice, run each slice alone.

        Args:
            model: Network to run.
            lane: Lane of all the slices.
            slices: Rows of one or more queries.

        Returns:
            The failures by `id` of the slice; empty if all rows have run.
        """
        try:
            self._run(model, lane, slices)
            self._wait(model.device)
            return {}
        except Exception as error:
            if len(slices) == 1 or isinstance(error, OF_WHOLE_BATCH):
                return {id(each): error for each in slices}
        failures: dict[int, Exception] = {}
        for each in slices:
            failures |= self.run(model, lane, [each])
        return failures

    def _wait(self, device: torch.device) -> None:
        """Wait until a GPU has finished all batches but the last `IN_FLIGHT`."""
        if device.type == "cuda":
            self._in_flight.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            self._in_flight[-1].record(torch.cuda.current_stream(device))
            if len(self._in_flight) > IN_FLIGHT:
                self._in_flight.popleft().synchronize()

    def _run(self, model: Model, lane: Lane, slices: list[BatchSlice]) -> None:
        """Run the slices as one batch or, if it does not fit into memory, in parts of it."""
        rows = sum(each.stop - each.start for each in slices)
        if rows > self.batch_size(lane):  # memory ran out, then another error occurred, and the slice is run alone
            self._run_parts(model, lane, slices, self.batch_size(lane))
            return
        size = self._size(model, lane, rows)
        full = self.batch_size(lane) if self.padded else size
        try:
            with full_linear_layers(model, size, full):
                run_batch(model, lane, slices, size)
        except torch.OutOfMemoryError:
            pass  # the code below runs after this block, because the traceback keeps the tensors of the batch alive
        else:
            return
        if size == 1:
            raise OutOfMemory(
                f"one row of {model.name} does not fit into the device's memory; "
                "use a smaller model or a device with more memory"
            )
        forget_recording(model)
        forget_slots(model)
        # torch does this for all GPUs, and raises the error of one that has failed. A batch on it fails below.
        with suppress(RuntimeError):
            empty_cache()
        self._largest[lane.model, lane.kind] = size // 2
        self._on_halved(model, lane.kind, size // 2)
        self._run_parts(model, lane, slices, size // 2)

    def _run_parts(self, model: Model, lane: Lane, slices: list[BatchSlice], size: int) -> None:
        for chunk in _chunks(slices, size):
            self._run(model, lane, chunk)


def _chunks(slices: list[BatchSlice], size: int) -> list[list[BatchSlice]]:
    """Cut the rows of the slices, in order, into batches of at most `size` rows."""
    chunks: list[list[BatchSlice]] = [[]]
    room = size
    for each in slices:
        start = each.start
        while start < each.stop:
            if not room:
                chunks.append([])
                room = size
            stop = min(each.stop, start + room)
            chunks[-1].append(BatchSlice(each.query, start, stop))
            room -= stop - start
            start = stop
    return chunks
