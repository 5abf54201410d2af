"""Scheduler that forms batches from the queries of all jobs. It uses no device, thread or clock.

Each job has one query at a time, with a cursor. A batch takes rows of several queries of one lane until it is full. The
scheduler measures time in batches. Its rules:

- Shortest first: the job that owes the fewest rows in all goes first. A Grad-CAM request of one row passes a Poly-CAM
  request of three thousand rows.
- Weights: a job's rows are multiplied by its weight. A job of weight 16 counts as owing sixteen times its rows, and a
  job of weight 1/16 as owing a sixteenth of them.
- No starvation: the count of a job halves with every `PATIENCE` batches that contain no row of it.
- Shared batches: while other jobs of no larger weight wait for the same lane, a job receives at most half of a batch in
  the first round. A second round distributes the remaining rows in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

PATIENCE = 2

Lane = TypeVar("Lane", bound=Hashable)


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of the query of a job."""

    job: int
    start: int
    stop: int


@dataclass(frozen=True)
class Batch(Generic[Lane]):
    """Rows of one lane that run together."""

    lane: Lane
    ranges: tuple[RowRange, ...]


@dataclass
class _ScheduledQuery(Generic[Lane]):
    lane: Lane
    rows: int
    max_per_batch: int
    later_rows: int  # rows of the job's later queries
    weight: float
    last_batch: int  # number of the batch that last contained a row of it, or before which it was added
    cursor: int = 0

    @property
    def rows_left(self) -> int:
        return self.rows - self.cursor


class Scheduler(Generic[Lane]):
    """Holds the query of each job and forms batches.

    Args:
        size: Function from a lane to the number of rows of a full batch.
    """

    def __init__(self, size: Callable[[Lane], int]) -> None:
        self._size = size
        self._queries: dict[int, _ScheduledQuery[Lane]] = {}
        self._batches = 0

    def __len__(self) -> int:
        """Return the number of jobs that wait for rows."""
        return len(self._queries)

    def add(
        self,
        job: int,
        lane: Lane,
        rows: int,
        *,
        max_per_batch: int | None = None,
        later_rows: int = 0,
        weight: float = 1.0,
    ) -> None:
        """Add the query of a job. It replaces the job's earlier query.

        Args:
            job: Id of the job.
            lane: Lane of the query.
            rows: Number of rows, at least 1.
            max_per_batch: Largest number of rows that one batch may contain; all of them if None.
            later_rows: Number of rows of the job's later queries, for the order of the jobs.
            weight: Factor on the rows that the job owes, for the order of the jobs.
        """
        self._queries[job] = _ScheduledQuery(lane, rows, max_per_batch or rows, later_rows, weight, self._batches)

    def remove(self, job: int) -> None:
        """Remove the query of a job, if it has one."""
        self._queries.pop(job, None)

    def rows_owed(self) -> int:
        """Return the number of rows that all jobs owe, including those of their later queries."""
        return sum(query.rows_left + query.later_rows for query in self._queries.values())

    def next_batch(self) -> Batch[Lane] | None:
        """Form the next batch and advance the cursors of its queries.

        Returns:
            The batch, or None if no job waits. A query whose last row is in the batch is removed.
        """
        if not self._queries:
            return None
        order = sorted(self._queries, key=self._rank)
        lane = self._queries[order[0]].lane
        waiting = [job for job in order if self._queries[job].lane == lane]
        size = room = self._size(lane)
        taken = dict.fromkeys(waiting, 0)
        # A job shares the batch if another job weighs no more, which holds from the second smallest weight on.
        shared = [*sorted(self._queries[job].weight for job in waiting), math.inf][1]
        for cap in ((size + 1) // 2, size):
            for job in waiting:
                query = self._queries[job]
                limit = cap if query.weight >= shared else size
                more = min(room, limit - taken[job], min(query.rows_left, query.max_per_batch) - taken[job])
                if more > 0:
                    taken[job] += more
                    room -= more
        self._batches += 1
        return Batch(lane, tuple(self._advance(job, rows) for job, rows in taken.items() if rows))

    def _rank(self, job: int) -> tuple[float, int]:
        query = self._queries[job]
        waited = self._batches - query.last_batch
        return ((query.rows_left + query.later_rows) * query.weight * 0.5 ** (waited / PATIENCE), job)

    def _advance(self, job: int, rows: int) -> RowRange:
        query = self._queries[job]
        taken = RowRange(job, query.cursor, query.cursor + rows)
        query.cursor += rows
        query.last_batch = self._batches
        if not query.rows_left:
            del self._queries[job]
        return taken
