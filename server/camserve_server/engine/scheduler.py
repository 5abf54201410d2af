"""Plans in, batches out. Pure: no device, no thread, no clock; time is counted in batches.

There are no phases, only rows still owed. Each job has one question at a time, with a cursor; a batch takes some rows
of each until it is full. Who goes first:

- Shortest first: the job that owes the fewest rows in all, so that a Grad-CAM that needs one row passes a Poly-CAM that
  owes three thousand.
- Weights: a job of weight 16 is taken to owe sixteen times its rows, one of weight 1/16 a sixteenth of them.
- Nobody starves: what a job is taken to owe halves with every `PATIENCE` batches that pass it by.
- Nobody takes all: while others that weigh no more wait for the same lane, a job gets at most half of a batch in the
  first round; what they leave is then shared out in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

PATIENCE = 2

Lane = TypeVar("Lane", bound=Hashable)


@dataclass(frozen=True)
class Take:
    """Rows [start, stop) of the job's question."""

    job: int
    start: int
    stop: int


@dataclass(frozen=True)
class Batch(Generic[Lane]):
    """Rows of one lane, to be run together."""

    lane: Lane
    takes: tuple[Take, ...]


@dataclass
class _Question(Generic[Lane]):
    lane: Lane
    rows: int
    width: int
    later: int  # rows that the job will ask for after this question
    weight: float
    asked_at: int  # the batch number at which it last had a row, or was asked
    cursor: int = 0

    @property
    def left(self) -> int:
        return self.rows - self.cursor


class Scheduler(Generic[Lane]):
    """Holds every job's question and forms batches out of them. `size(lane)` is the number of rows of a full batch."""

    def __init__(self, size: Callable[[Lane], int]) -> None:
        self._size = size
        self._questions: dict[int, _Question[Lane]] = {}
        self._batches = 0

    def __len__(self) -> int:
        """Jobs that wait for rows."""
        return len(self._questions)

    def ask(
        self, job: int, lane: Lane, rows: int, *, width: int | None = None, later: int = 0, weight: float = 1.0
    ) -> None:
        """The job owes `rows` (at least 1) in `lane`, at most `width` of them in one batch, and `later` ones after."""
        self._questions[job] = _Question(lane, rows, width or rows, later, weight, self._batches)

    def drop(self, job: int) -> None:
        """Forgets the job's question, if it has one."""
        self._questions.pop(job, None)

    def rows_owed(self) -> int:
        """Rows of all questions, those to come included."""
        return sum(q.left + q.later for q in self._questions.values())

    def next_batch(self) -> Batch[Lane] | None:
        """The rows to run next, or None if nobody waits. Their cursors have moved on; full questions are forgotten."""
        if not self._questions:
            return None
        order = sorted(self._questions, key=self._rank)
        lane = self._questions[order[0]].lane
        waiting = [job for job in order if self._questions[job].lane == lane]
        size = room = self._size(lane)
        taken = dict.fromkeys(waiting, 0)
        # From the second lightest on, there is another that weighs no more.
        shared = [*sorted(self._questions[job].weight for job in waiting), math.inf][1]
        for cap in ((size + 1) // 2, size):
            for job in waiting:
                question = self._questions[job]
                most = cap if question.weight >= shared else size
                more = min(room, most - taken[job], min(question.left, question.width) - taken[job])
                if more > 0:
                    taken[job] += more
                    room -= more
        self._batches += 1
        return Batch(lane, tuple(self._take(job, rows) for job, rows in taken.items() if rows))

    def _rank(self, job: int) -> tuple[float, int]:
        question = self._questions[job]
        waited = self._batches - question.asked_at
        return ((question.left + question.later) * question.weight * 0.5 ** (waited / PATIENCE), job)

    def _take(self, job: int, rows: int) -> Take:
        question = self._questions[job]
        take = Take(job, question.cursor, question.cursor + rows)
        question.cursor += rows
        question.asked_at = self._batches
        if not question.left:
            del self._questions[job]
        return take
