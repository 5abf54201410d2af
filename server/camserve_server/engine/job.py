"""A plan in flight, with what it must keep to and what it has cost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from camserve_server.engine.counters import Ran
from camserve_server.engine.lanes.dispatch import Lane, LaneQuery
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.randomise import RandomCopy
from camserve_server.plan import Level, MapWarning, Plan, Randomised, Stage

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Rows done and rows in all, as far as is known; the total may shrink."""

    rows_done: int
    rows_total: int


Event = Progress | Level | Randomised | Stage | MapWarning


@dataclass(frozen=True)
class Limits:
    """What a request must keep to: times are of `time.monotonic()`.

    After `deadline` it has failed. From `until` on, or when `budget` rows but those `reserved` for what comes later are
    spent, questions that have a `least` are answered with what is there. It cannot do with less than `least` rows, of
    which the model does `rows_per_s` at best.
    """

    deadline: float | None = None
    until: float | None = None
    budget: int | None = None
    reserved: int = 0
    least: int = 0
    rows_per_s: float = 0.0


@dataclass(eq=False)
class Job(Generic[T]):
    """A plan in flight. `future` gives its result or raises a CamserveError; `cancel` may be called from any thread.

    The other fields belong to the engine's thread until the future is done; then they are the job's cost.
    """

    id: int
    plan: Plan[T]
    model: Model
    future: Future[T]
    tell: Callable[[Event], None]
    owed: int
    limits: Limits
    submitted: float
    batch_sizes: dict[LaneKind, int]  # those that it runs at, less if memory has run out
    weight: float = 1.0  # the scheduler takes it to owe so many times its rows
    rows: int = 0
    batches: int = 0
    first_batch: float | None = None
    finished: float | None = None
    query: LaneQuery | None = None
    lane: Lane | None = None
    copy: RandomCopy | None = None  # its own, which answers its questions as long as there is one
    most: int = 0  # rows that the query may take
    done: int = 0  # rows that it has had
    cut_at: int = 0  # rows of the job when a question of its was answered early; 0 if none was
    ran: list[tuple[Ran, int]] = field(default_factory=list)  # the first batches that it was part of, its rows in each
    context: Context = field(default_factory=copy_context)  # of whoever handed it in: log lines about it say the same

    @property
    def network(self) -> Model:
        """What answers its questions: the model, or its own copy of it."""
        return self.copy.model if self.copy else self.model

    @property
    def left(self) -> int:
        """Rows that it will still take, as far as is known: those that it owes, within its budget."""
        budget = self.limits.budget
        return self.owed if budget is None else min(self.owed, max(0, budget - self.rows))

    @property
    def queue_ms(self) -> float:
        """From arrival to the first batch."""
        return 1e3 * ((self.first_batch or self.finished or self.submitted) - self.submitted)

    @property
    def compute_ms(self) -> float:
        """From the first batch to the result."""
        return 1e3 * ((self.finished or 0.0) - self.first_batch) if self.first_batch else 0.0
