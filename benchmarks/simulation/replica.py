"""A simulated server process: the scheduler and the admission control of the server, and batches of known durations.

The class does what `camserve_server.engine.batch_loop` does, without models, threads and tensors. `Scheduler`,
`Admission`, `BatchTimes` and `Throughput` are those of the server.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from benchmarks.simulation.events import Timeline
from benchmarks.simulation.profile import MethodCost, Profile, Step
from camserve_server.engine.admission import Admission, Claim
from camserve_server.engine.batch_times import BatchTimes
from camserve_server.engine.lanes.lane_query import Lane
from camserve_server.engine.scheduler import Batch, Scheduler
from camserve_server.errors import CamserveError, Expired
from camserve_server.models.model import LaneKind
from camserve_server.models.throughput import Throughput

MAX_ROWS_OWED = 200_000  # default of the server


@dataclass(eq=False, slots=True)
class Reply:
    """End of a call.

    Attributes:
        error: The error, or None for a result.
        early: True if a deadline made the result smaller.
    """

    error: CamserveError | None = None
    early: bool = False


@dataclass(eq=False, slots=True)
class _Job:
    id: int
    cost: MethodCost
    deadline: float
    early_from: float
    reply: Callable[[Reply], None]
    rows_owed: int
    next_step: int = 0
    query: Step | None = None
    query_rows: int = 0  # rows that the query may take
    done: int = 0  # rows of the query that have run
    early: bool = False


class Replica:
    """A server process with one engine.

    Args:
        timeline: Clock and events.
        profile: Times of the server.
        max_rows_owed: Limit of the rows that may wait.

    Attributes:
        reachable: False while no request arrives and no reply leaves.
        rows_run: Rows of requests in all batches.
    """

    def __init__(self, timeline: Timeline, profile: Profile, max_rows_owed: int = MAX_ROWS_OWED) -> None:
        self.reachable = True
        self.rows_run = 0
        self._timeline = timeline
        self._profile = profile
        self._max_rows_owed = max_rows_owed
        # The engine compares with the longest recent batch of the lanes in use.
        self._longest_s = max(profile.batch(kind, rows)[1] for kind, rows in profile.batch_sizes.items())
        self._starts = 0
        self._calls = 0
        self._start()

    def _start(self) -> None:
        self._admission = Admission(self._max_rows_owed, self._timeline.clock)
        self._scheduler: Scheduler[LaneKind] = Scheduler(self._profile.batch_sizes.__getitem__)
        self._times = BatchTimes()
        self._throughput = Throughput()
        self._jobs: dict[int, _Job] = {}
        self._running = False  # a batch runs, or the next one is about to start
        self._plan_s = 0.0  # time of plans since the last batch
        self._host_free = 0.0
        self._next_deadline = math.inf  # no later than the first deadline of a job

    def rows_owed(self) -> int:
        """Return the rows that all admitted requests still owe."""
        return self._admission.rows_owed()

    def seconds_owed(self) -> float:
        """Return the seconds that the replica needs for the rows that it owes."""
        return self._admission.seconds_owed(self._times.rows_per_s)

    def call(self, cost: MethodCost, deadline: float, reply: Callable[[Reply], None]) -> bool:
        """Send a request. `reply` is called once, unless the replica is lost first.

        Args:
            cost: Rows of the request.
            deadline: Latest time of the answer.
            reply: Receives the end of the call.

        Returns:
            True if the request was admitted. The server then sends its id, after which gRPC does not retry.
        """
        now = self._timeline.now
        self._calls += 1
        claim = Claim(cost.most, cost.least, self._throughput.best(now), deadline)
        try:
            self._admission.admit(self._calls, claim, self._times.rows_per_s)
        except CamserveError as error:
            reply(Reply(error))
            return False
        early_from = math.inf
        if cost.can_stop_early and self._throughput.average:
            early_from = deadline - 0.1 * (deadline - now)  # as `request_plan.limits` without metrics
        job = _Job(self._calls, cost, deadline, early_from, reply, cost.most)
        self._on_host(self._submit, job)
        return True

    def lose(self) -> None:
        """Lose the process with all its requests, without any reply."""
        self.reachable = False
        self._starts += 1
        self._start()

    def restart(self) -> None:
        """Accept requests again, with an empty queue."""
        self.reachable = True

    def _on_host(self, action: Callable[[_Job], None], job: _Job) -> None:
        """Let the host work for half of the time that it needs for a request, after the plans that run now."""
        self._host_free = max(self._host_free, self._timeline.now + self._plan_s) + self._profile.host_s / 2
        self._later(self._host_free, action, job)

    def _later(self, time: float, action: Callable[..., None], *arguments: object) -> None:
        self._timeline.at(time, self._unless_lost, self._starts, action, arguments)

    def _unless_lost(self, starts: int, action: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if starts == self._starts:
            action(*arguments)

    # ---- the loop of the engine --------------------------------------------------------------------------------------

    def _submit(self, job: _Job) -> None:
        self._jobs[job.id] = job
        self._next_deadline = min(self._next_deadline, job.deadline, job.early_from)
        self._resume(job)
        self._continue()

    def _continue(self) -> None:
        """Start the next batch when plans have used the engine's thread, unless a batch runs."""
        if not self._running:
            self._running = True
            self._later(self._timeline.now + self._plan_s, self._run_batch)
            self._plan_s = 0.0

    def _run_batch(self) -> None:
        now = self._timeline.now
        if now + self._longest_s >= self._next_deadline:
            self._check_deadlines(now)
        batch = self._scheduler.next_batch()
        if batch is None:
            self._running = False
            self._times.idle()
            return
        rows = sum(each.stop - each.start for each in batch.ranges)
        size, seconds = self._profile.batch(batch.lane, rows)
        self._later(now + seconds, self._end_batch, batch, rows, size, now)

    def _check_deadlines(self, now: float) -> None:
        """Fail jobs whose deadline has passed, and answer queries whose next batch would end too late."""
        for job in [*self._jobs.values()]:
            query = job.query
            if job.deadline <= now:
                self._finish(job, Expired("the deadline passed"))
            elif query is not None and query.min_rows is not None and job.done >= query.min_rows and self._late(job):
                self._answer(job)
        self._next_deadline = min((min(job.deadline, job.early_from) for job in self._jobs.values()), default=math.inf)

    def _late(self, job: _Job) -> bool:
        return self._timeline.now + self._longest_s >= job.early_from

    def _end_batch(self, batch: Batch[LaneKind], rows: int, size: int, started: float) -> None:
        now = self._timeline.now
        self.rows_run += rows
        seconds = self._times.add(_LANES[batch.lane], rows, started, now)
        if batch.lane == "forward" and size >= self._profile.batch_sizes["forward"]:
            self._throughput.observe(size, seconds, now)
        for each in batch.ranges:
            job = self._jobs[each.job]
            job.done = each.stop
            self._set_rows_owed(job, job.rows_owed - (each.stop - each.start))
            if job.done >= job.query_rows:
                self._answer(job)
        self._running = False
        self._continue()

    def _answer(self, job: _Job) -> None:
        """Resume the plan of a job. Rows of its query that have not run are no longer owed."""
        assert job.query is not None, "a job with rows in a batch has a query"
        left = job.query.rows - job.done
        job.early = job.early or left > 0
        self._set_rows_owed(job, job.rows_owed - left)
        self._scheduler.remove(job.id)
        job.query = None
        self._resume(job)

    def _resume(self, job: _Job) -> None:
        """Let the plan run until its next query or its end."""
        steps = job.cost.steps
        self._plan_s += job.cost.plan_s / (len(steps) + 1)
        if job.next_step == len(steps):
            self._finish(job, None)
            return
        step = steps[job.next_step]
        job.next_step += 1
        if step.released:
            self._set_rows_owed(job, job.rows_owed - step.released)
        job.query, job.done, job.query_rows = step, 0, step.rows
        if step.min_rows is not None and self._late(job):
            job.query_rows = step.min_rows
        if not job.query_rows:
            self._answer(job)
            return
        self._scheduler.add(
            job.id,
            step.kind,
            job.query_rows,
            max_per_batch=step.max_per_batch or None,
            later_rows=max(0, job.rows_owed - job.query_rows),
        )

    def _set_rows_owed(self, job: _Job, rows: int) -> None:
        job.rows_owed = max(0, rows)
        self._admission.set_rows_owed(job.id, job.rows_owed)

    def _finish(self, job: _Job, error: CamserveError | None) -> None:
        self._scheduler.remove(job.id)
        del self._jobs[job.id]
        self._admission.release(job.id)
        if error is None:
            self._on_host(self._respond, job)
        else:
            job.reply(Reply(error))

    def _respond(self, job: _Job) -> None:
        job.reply(Reply(early=job.early))


_LANES: dict[LaneKind, Lane] = {kind: Lane("simulated", kind, 0) for kind in get_args(LaneKind)}
