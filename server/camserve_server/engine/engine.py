"""The one thread of a device. It holds all plans in flight, answers their questions in full batches, and steps them.

Whatever touches a model or a plan happens on this thread. Others hand in plans, and are told of events and results
by callbacks on it: those must not block.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import structlog
import torch

from camserve_server.engine.admission import WEIGHTS, Admission, Caller, Claim, Priority
from camserve_server.engine.batch_runner import BatchRunner
from camserve_server.engine.counters import Counters, Ran
from camserve_server.engine.job import Event, Job, Limits, Progress
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane, LaneQuery, start_query
from camserve_server.engine.random_copies import RandomCopyPool
from camserve_server.engine.scheduler import Batch, Scheduler
from camserve_server.errors import (
    CamserveError,
    Cancelled,
    Expired,
    InternalError,
    OutOfMemory,
    Unavailable,
)
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.randomise import weighted_layers
from camserve_server.plan import (
    Answer,
    ClassWeights,
    MapWarning,
    Plan,
    Query,
    Randomise,
    ReleaseRows,
    Report,
    WeightedLayers,
)

NO_LIMITS = Limits()
ANYBODY = Caller()
MOST_RAN = 16  # of a request's batches, those that are remembered one by one
T = TypeVar("T")
log = structlog.get_logger()


class Engine:
    """Runs plans on one device.

    `max_rows_owed` bounds what may wait; with `batch_invariant`, batches are padded to their lane's size. There are at
    most `max_copies` random copies of networks at a time, one a request; who comes later waits.
    """

    def __init__(
        self,
        *,
        max_rows_owed: int = 200_000,
        batch_invariant: bool = True,
        max_copies: int = 2,
    ) -> None:
        self.counters = Counters()
        self._admission = Admission(max_rows_owed)
        self._runner = BatchRunner(padded=batch_invariant, on_halved=self._halve)
        self._copies = RandomCopyPool(max_copies)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._scheduler: Scheduler[Lane] = Scheduler(self._runner.batch_size)
        self._jobs: dict[int, Job[Any]] = {}
        self._between: set[Future[None]] = set()
        self._ids = itertools.count(1)
        self._rows_per_s = 0.0  # as they are being done, with what the plans do between batches
        self._busy_since: float | None = None  # the end of the last batch, unless nobody waited then
        self._batch_s: dict[tuple[str, LaneKind], float] = {}  # about the longest that batches take these days
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.died: Future[None] = Future()  # done when the thread has ended; with an exception if it broke

    # ---- for any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(
        self,
        plan: Plan[T],
        model: Model,
        *,
        rows: int,
        limits: Limits = NO_LIMITS,
        batch_sizes: Mapping[LaneKind, int] | None = None,
        caller: Caller = ANYBODY,
        priority: Priority = "normal",
        tell: Callable[[Event], None] = lambda event: None,
    ) -> Job[T]:
        """Takes in a plan that will ask for at most about `rows` rows of `model`.

        `batch_sizes` are the model's own unless given. `tell` is called on the engine's thread and must not block.
        Raises Unavailable while closing, QueueFull if too many rows would go before them or `caller` owes too many, and
        Expired if they cannot be done by the deadline.
        """
        sizes = {**model.batch_sizes, **(batch_sizes or {})}
        now, weight = time.monotonic(), WEIGHTS[priority]
        job = Job(next(self._ids), plan, model, Future(), tell, rows, limits, now, sizes, weight)
        claim = Claim(job.left, limits.least, limits.rows_per_s, limits.deadline, caller, priority)
        self._admission.admit(job.id, claim, self._rows_per_s)
        job.future.set_running_or_notify_cancel()  # only the engine settles it
        self._inbox.put(lambda: self._begin(job))
        return job

    def look(self, rows: int, caller: Caller, priority: Priority) -> None:
        """Raises what `submit` would by now for so many rows, whatever their deadline."""
        self._admission.look(Claim(rows, caller=caller, priority=priority), self._rows_per_s)

    def cancel(self, job: Job[Any]) -> None:
        """Drops the job at the next batch; its future raises Cancelled."""
        self._inbox.put(lambda: self._end(job, error=Cancelled("the caller cancelled the request")))

    def between(self, steps: Iterator[None]) -> Future[None]:
        """Runs the steps on the engine's thread, batches of others between them; done with the last one."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # only the engine settles it
        self._between.add(done)
        done.add_done_callback(self._between.discard)

        def step() -> None:
            try:
                next(steps)
            except StopIteration:
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)
            else:
                self._inbox.put(step)

        self._inbox.put(step)
        return done

    def close(self) -> None:
        """Takes in no more, fails what runs, ends the thread."""
        self._admission.close()
        self._inbox.put(self._halt)
        if self._thread.is_alive():
            self._thread.join()

    def rows_owed(self) -> int:
        """Rows of all requests that are not done."""
        return self._admission.rows_owed()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while not self._stop:
                    self._read_inbox()
                    self._drop_expired()
                    self._cut_short()
                    batch = self._scheduler.next_batch()
                    if batch is not None:
                        self._run_batch(batch)
                    else:
                        self._busy_since = None
        except BaseException as error:  # a bug of ours: nothing may wait for ever
            log.exception("engine died")
            self._admission.close()
            for job in [*self._jobs.values()]:
                self._finish(job, error=InternalError("the engine died"))
            self.died.set_exception(error)
        else:
            self.died.set_result(None)
        finally:
            for steps in [*self._between]:
                steps.set_exception(Unavailable("the server has shut down", retry_after_s=1.0))

    def _read_inbox(self) -> None:
        """Does what others have asked for so far; waits for it if there is nothing else to do."""
        commands = max(self._inbox.qsize(), 0 if len(self._scheduler) else 1)
        for _ in range(commands):
            self._inbox.get()()
            if self._stop:
                return

    def _halt(self) -> None:
        self._stop = True
        for job in [*self._jobs.values()]:
            self._end(job, error=Unavailable("the server has shut down", retry_after_s=1.0))

    def _drop_expired(self) -> None:
        now = time.monotonic()
        for job in [j for j in self._jobs.values() if j.limits.deadline is not None and j.limits.deadline <= now]:
            waited = 1e3 * (now - job.submitted)
            self._end(
                job,
                error=Expired(
                    f"the deadline passed after {waited:.0f} ms, {job.rows} of about {job.rows + job.left} rows done",
                    metadata={"queue_ms": f"{job.queue_ms:.0f}", "rows_done": str(job.rows)},
                ),
            )

    def _cut_short(self) -> None:
        """Answers what can be answered early with what is there, for those whose time is up."""
        if all(job.limits.until is None for job in self._jobs.values()):
            return
        soon = self._next_end({job.lane for job in self._jobs.values() if job.lane and job.query})
        for job in [job for job in self._jobs.values() if job.limits.until is not None and soon >= job.limits.until]:
            query = job.query
            if query is not None and query.min_rows is not None and job.done >= query.min_rows:
                self._answer(job, query)

    def _next_end(self, lanes: Collection[Lane]) -> float:
        """When the next batch will have been run at the latest, if it is of one of these lanes."""
        return time.monotonic() + max((self._batch_s.get((lane.model, lane.kind), 0.0) for lane in lanes), default=0.0)

    def _begin(self, job: Job[Any]) -> None:
        self._jobs[job.id] = job
        for kind, size in job.batch_sizes.items():
            job.batch_sizes[kind] = self._runner.fitting_size(job.model.lane_key, kind, size)
        self._step(job, None)

    def _step(self, job: Job[Any], answer: Answer[Any] | None) -> None:
        """Runs the plan until it asks for rows, or ends."""
        while True:
            try:
                # The first send of a generator must be None; it has asked for nothing yet.
                query = job.context.run(job.plan.send, answer)  # type: ignore[arg-type]
                if torch.is_grad_enabled():
                    torch.set_grad_enabled(False)
                    raise RuntimeError("the plan left the grad mode on across a yield")
                if isinstance(query, Randomise) and self._copies.enqueue_if_full(job, query):
                    return
                answer = self._remark(job, query) or self._ask(job, query)
                if answer is None:
                    return
            except StopIteration as stop:
                self._end(job, result=stop.value)
                return
            except Exception as error:
                self._end(job, error=error)
                return

    def _remark(self, job: Job[Any], query: Query[Any]) -> Answer[Any] | None:
        """Answers a query that costs nothing; None for one that costs rows."""
        match query:
            case ClassWeights(index):
                return partial(job.network.class_weights, index)
            case WeightedLayers():
                return partial(weighted_layers, job.model)
            case Randomise():
                return partial(self._randomise, job, query)
            case ReleaseRows(rows):
                self._owe(job, job.owed - rows)
                _tell(job, Progress(job.rows, job.rows + job.left))
            case Report(event):
                _tell(job, event)
            case _:
                return None
        return _nothing

    def _randomise(self, job: Job[Any], query: Randomise) -> None:
        """Runs inside the plan, at the line that asked."""
        self._copies.randomise(job, query)
        if job.copy is None:
            self._inbox.put(self._lend)  # not at once: a plan is running

    def _lend(self) -> None:
        """Lets those go on that wait for a copy, as far as there may be more."""
        while (first := self._copies.pop_next()) is not None:
            job, query = first
            self._step(job, partial(self._randomise, job, query))

    def _ask(self, job: Job[Any], query: Query[Any]) -> Answer[Any] | None:
        """Puts the query to the scheduler; if no row is left for it, answers it."""
        copy = job.id if job.copy else 0
        lane, started = start_query(query, job.network, job.batch_sizes, copy)
        job.most, job.done = started.rows, 0
        if started.min_rows is not None:
            if job.limits.budget is not None:
                job.most = min(started.rows, job.limits.budget - job.limits.reserved - job.rows)
            if job.limits.until is not None and self._next_end([lane]) >= job.limits.until:
                job.most = 0
            job.most = min(started.rows, max(started.min_rows, job.most))
        if not job.most:
            self._owe(job, job.owed - started.rows)
            job.cut_at = job.rows if started.rows else job.cut_at
            return started.answer
        job.lane, job.query = lane, started
        later = max(0, job.left - job.most)
        self._scheduler.add(
            job.id,
            lane,
            job.most,
            max_per_batch=min(started.max_per_batch, job.most),
            later_rows=later,
            weight=job.weight,
        )
        return None

    def _owe(self, job: Job[Any], rows: int) -> None:
        job.owed = max(0, rows)
        self._admission.owe(job.id, job.left)

    def _run_batch(self, batch: Batch[Lane]) -> None:
        jobs = [self._jobs[rows.job] for rows in batch.ranges]
        model = jobs[0].network
        started = time.monotonic()
        for job in jobs:
            job.first_batch = job.first_batch or started
        slices = [
            BatchSlice(self._query(job), rows.start, rows.stop) for job, rows in zip(jobs, batch.ranges, strict=True)
        ]
        failures = self._runner.run(model, batch.lane, slices)
        ran = self._count(model, batch.lane, sum(each.stop - each.start for each in slices), started)
        for job, each in zip(jobs, slices, strict=True):
            if len(job.ran) < MOST_RAN:
                job.ran.append((ran, each.stop - each.start))
            self._advance(job, each, failures.get(id(each)))

    def _halve(self, model: Model, kind: LaneKind, size: int) -> None:
        """No batch of that kind is larger from here on, and receipts say so."""
        model.batch_sizes[kind] = min(model.batch_sizes[kind], size)
        for job in [job for job in self._jobs.values() if job.model.lane_key == model.lane_key]:
            job.batch_sizes[kind] = min(job.batch_sizes[kind], size)
            job.context.run(log.warning, "out of memory, batch halved", model=model.name, lane=kind, size=size)
            if job.rows:
                _tell(job, MapWarning(f"memory ran out: batches are of {size} rows since; a replay may differ"))

    def _advance(self, job: Job[Any], rows_run: BatchSlice, failure: Exception | None) -> None:
        if failure is not None:
            self._end(job, error=failure)
            return
        rows = rows_run.stop - rows_run.start
        job.rows += rows
        job.done = rows_run.stop
        job.batches += 1
        query = self._query(job)
        self._owe(job, job.owed - rows)
        _tell(job, Progress(job.rows, job.rows + job.left))
        if query.is_complete() or rows_run.stop >= job.most:
            self._answer(job, query)

    def _answer(self, job: Job[Any], query: LaneQuery) -> None:
        """Sends the plan its answer; the rows that are not done are owed no more."""
        left = query.rows - job.done
        if not query.is_complete():
            job.cut_at = job.rows
        self._owe(job, job.owed - left)
        self._scheduler.remove(job.id)
        job.query = None
        self._step(job, query.answer)

    def _end(self, job: Job[Any], *, result: Any = None, error: Exception | None = None) -> None:
        """Closes the plan, on this thread and nowhere else, and settles the future."""
        if job.id not in self._jobs:
            return
        self._scheduler.remove(job.id)
        job.query = None
        try:
            job.plan.close()
        except Exception as broken:  # the plan yielded while being closed
            error = error or broken
        self._finish(job, result=result, error=error)

    def _finish(self, job: Job[Any], *, result: Any = None, error: Exception | None = None) -> None:
        if self._copies.release(job):
            self._inbox.put(self._lend)  # not at once: a plan may be running
        del self._jobs[job.id]
        self._admission.leave(job.id)
        job.finished = time.monotonic()
        if error is None:
            job.future.set_result(result)
        elif isinstance(error, CamserveError):
            job.future.set_exception(error)
        elif isinstance(error, torch.OutOfMemoryError):  # in the plan itself, not in a batch
            job.future.set_exception(OutOfMemory(f"what it keeps of {job.model.name} does not fit into memory"))
        else:
            job.context.run(log.error, "plan failed", exc_info=error)
            job.future.set_exception(InternalError("an internal error; the server's log says more"))
            if job.model.device.type == "cuda":  # raises, and ends the engine, where nothing runs there any more
                torch.cuda.synchronize(job.model.device)

    def _query(self, job: Job[Any]) -> LaneQuery:
        assert job.query is not None, "a job with rows in a batch has a query"
        return job.query

    def _count(self, model: Model, lane: Lane, rows: int, started: float) -> Ran:
        key, now = (lane.model, lane.kind), time.monotonic()
        ran = Ran(self.counters.batches + 1, lane.kind, rows, self._runner.padding_rows(lane, rows), started, now)
        self.counters.count(model, ran)
        self._batch_s[key] = max(now - started, 0.9 * self._batch_s.get(key, 0.0))
        rate = rows / max(now - (self._busy_since or started), 1e-9)
        self._busy_since = now
        self._rows_per_s = 0.9 * (self._rows_per_s or rate) + 0.1 * rate
        return ran


def _nothing() -> None:
    return None


def _tell(job: Job[Any], event: Event) -> None:
    try:
        job.tell(event)
    except Exception:  # whoever watches may be gone; the engine does not care
        job.context.run(log.debug, "nobody to tell")
