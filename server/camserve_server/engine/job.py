"""A plan that the engine runs, with its limits and its cost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from camserve_server.engine.counters import BatchRecord
from camserve_server.engine.lanes.dispatch import Lane, LaneQuery
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.randomise import RandomCopy
from camserve_server.plan import Level, MapWarning, Plan, Randomised, Stage

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """The progress of a request.

    Attributes:
        rows_done: The rows that have run.
        rows_total: The current estimate of all rows of the request; it may shrink.
    """

    rows_done: int
    rows_total: int


Event = Progress | Level | Randomised | Stage | MapWarning


@dataclass(frozen=True)
class Limits:
    """Limits of a request. Times are on the clock of `time.monotonic()`.

    Attributes:
        deadline: The time at which the request fails; None for no deadline.
        answer_early_from: The time from which a query that has `min_rows` is answered with the rows that have run; None
            for never.
        budget: The most rows that the request may take; None for no budget. A query that has `min_rows` is answered
            early when all of the budget but `metric_rows` is used.
        metric_rows: The rows of the budget that are kept for metrics.
        least: The fewest rows with which the request can be answered.
        rows_per_s: The highest recent rate of the model; 0 if it is unknown.
    """

    deadline: float | None = None
    answer_early_from: float | None = None
    budget: int | None = None
    metric_rows: int = 0
    least: int = 0
    rows_per_s: float = 0.0

    def within_budget(self, rows: int, used: int = 0) -> int:
        """Return `rows`, or as many of them as the budget permits after `used` rows."""
        return rows if self.budget is None else min(rows, max(0, self.budget - used))


NO_LIMITS = Limits()


@dataclass(eq=False)
class Job(Generic[T]):
    """A plan that the engine runs.

    Until `future` is done, the engine's thread changes the fields; afterwards they are the cost of the request.

    Attributes:
        id: The identifier of the request in the engine.
        plan: The generator.
        model: The model that the request names.
        future: Gives the result of the plan or raises a CamserveError.
        notify: Receives the events of the request on the engine's thread; it must not block.
        rows_owed: The current upper bound of the rows that the request will still take, without its budget.
        limits: The limits of the request.
        submitted: The time of the submission, on the clock of `time.monotonic()`.
        batch_sizes: The batch size of each kind of lane; a size shrinks when memory runs out.
        weight: The factor by which the scheduler multiplies the owed rows.
        rows: The rows that have run.
        batches: The batches in which these rows ran.
        first_batch: The start of the first batch.
        finished: The end of the request.
        query: The query that the scheduler holds for this job, in the form that its lane runs.
        lane: The lane of `query`.
        copy: The job's copy of the network with random weights; while it exists, it answers the job's queries.
        query_rows: The rows that `query` may take.
        query_done: The rows of `query` that have run.
        rows_at_early_stop: The value of `rows` when a query was last answered early; 0 if none was.
        late: True if the deadline of the request may have ended a query early.
        batch_records: The first batches of the job, each with the number of the job's rows in it.
        cancelled: True if the caller has cancelled the request; any thread may set it.
        context: The context variables of the submitter; log lines about the job carry them.
    """

    id: int
    plan: Plan[T]
    model: Model
    future: Future[T]
    notify: Callable[[Event], None]
    rows_owed: int
    limits: Limits
    submitted: float
    batch_sizes: dict[LaneKind, int]
    weight: float = 1.0
    rows: int = 0
    batches: int = 0
    first_batch: float | None = None
    finished: float | None = None
    query: LaneQuery | None = None
    lane: Lane | None = None
    copy: RandomCopy | None = None
    query_rows: int = 0
    query_done: int = 0
    rows_at_early_stop: int = 0
    late: bool = False
    batch_records: list[tuple[BatchRecord, int]] = field(default_factory=list)
    cancelled: bool = False
    context: Context = field(default_factory=copy_context)

    @property
    def network(self) -> Model:
        """The model that answers the queries of the job: the model itself or the job's random copy of it."""
        return self.copy.model if self.copy else self.model

    @property
    def rows_left(self) -> int:
        """The current upper bound of the rows that the request will still take, within its budget."""
        return self.limits.within_budget(self.rows_owed, used=self.rows)

    def permitted_rows(self, rows: int, min_rows: int, *, late: bool) -> int:
        """Return how many rows of a query that can be answered early may run.

        Args:
            rows: All rows of the query.
            min_rows: The rows after which the query can be answered.
            late: True if the result of another batch would come too late.

        Returns:
            `min_rows` to `rows`.
        """
        permitted = rows
        if self.limits.budget is not None:
            permitted = min(rows, self.limits.budget - self.limits.metric_rows - self.rows)
        if late:
            permitted = 0
        return min(rows, max(min_rows, permitted))

    @property
    def queue_ms(self) -> float:
        """The milliseconds from the submission to the first batch."""
        return 1e3 * ((self.first_batch or self.finished or self.submitted) - self.submitted)

    @property
    def compute_ms(self) -> float:
        """The milliseconds from the first batch to the result."""
        return 1e3 * ((self.finished or 0.0) - self.first_batch) if self.first_batch else 0.0
