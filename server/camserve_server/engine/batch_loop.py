"""The loop of the engine's thread: it runs the queries of all plans in batches and resumes the plans.

All work on models and plans happens on this thread. Events and results are delivered through callbacks on it, which
must not block.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from typing import Any

import structlog
import torch

from camserve_server.engine.admission import Admission
from camserve_server.engine.batch_runner import BatchRunner
from camserve_server.engine.batch_times import BatchTimes
from camserve_server.engine.counters import BatchRecord, Counters
from camserve_server.engine.host_threads import HostThreads
from camserve_server.engine.interruption import Interruption
from camserve_server.engine.job import Job, Progress
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane, LaneQuery, start_query
from camserve_server.engine.outcomes import caller_cancelled, expired, notify_job, set_outcome, shut_down
from camserve_server.engine.random_copies import RandomCopyPool
from camserve_server.engine.scheduler import Batch, Scheduler
from camserve_server.engine.steps import Steps
from camserve_server.errors import InternalError
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.randomise import weighted_layers
from camserve_server.plan import (
    Answer,
    ClassWeights,
    MapWarning,
    OnHost,
    Query,
    Randomise,
    ReleaseRows,
    Report,
    WeightedLayers,
)
from camserve_server.torch_setup.arithmetic import gpu_arithmetic
from camserve_server.torch_setup.device import use_device
from camserve_server.torch_setup.spinning import SpinControl

MAX_BATCH_RECORDS = 16  # per request; traces show these batches one by one
log = structlog.get_logger()


class BatchLoop:
    """The jobs of an engine and the loop that runs their batches.

    Args:
        admission: Receives the rows that each job still owes.
        interruption: Ends batches of remote models early.
        batch_invariant: Pad each batch to the size of its lane.
        max_copies: The most random copies of networks at a time.

    Attributes:
        counters: The totals of all batches.
        closed: No job can begin, because the loop has been stopped or has failed.
        spinning: Observes the batches; set before `run`.
    """

    spinning: SpinControl

    def __init__(
        self, admission: Admission, interruption: Interruption, *, batch_invariant: bool, max_copies: int
    ) -> None:
        self.counters = Counters()
        self._admission = admission
        self._interruption = interruption
        self._runner = BatchRunner(padded=batch_invariant, on_halved=self._halve)
        self._copies = RandomCopyPool(max_copies)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._host = HostThreads(self._inbox.put, self._step)
        self._scheduler: Scheduler[Lane] = Scheduler(self._runner.batch_size)
        self._jobs: dict[int, Job[Any]] = {}
        self._arriving: dict[int, Job[Any]] = {}  # submitted, but not yet seen by the engine's thread
        self._steps = Steps(self._inbox.put)
        self._times = BatchTimes()
        self._stop = False
        self.closed = False
        self._closing = threading.Lock()  # no submission may enter the inbox after the command that ends the thread

    # ---- called from any thread --------------------------------------------------------------------------------------

    @property
    def rows_per_s(self) -> float:
        """The rate of recent batches."""
        return self._times.rows_per_s

    def submit(self, job: Job[Any]) -> None:
        """Begin a job before the next batch.

        Raises:
            Unavailable: The loop has been stopped.
        """
        with self._closing:
            if self.closed:
                raise shut_down()
            job.future.set_running_or_notify_cancel()  # only the engine sets the result
            self._arriving[job.id] = job
            self._inbox.put(lambda: self._begin(job))

    def cancel(self, job: Job[Any]) -> None:
        """Cancel a job before the next batch; its future then raises Cancelled."""
        self._inbox.put(lambda: self._end(job, error=caller_cancelled()))

    def run_between_batches(self, steps: Iterator[None]) -> Future[None]:
        """Run the steps of an iterator with batches between them; see `Engine.run_between_batches`."""
        with self._closing:
            if not self.closed:
                return self._steps.start(self._observed(steps))
        refused: Future[None] = Future()
        refused.set_exception(shut_down())
        return refused

    def stop(self) -> None:
        """Refuse new jobs, fail the running ones with Unavailable, and end the loop."""
        with self._closing:
            self.closed = True
            self._inbox.put(self._halt)

    def _observed(self, steps: Iterator[None]) -> Iterator[None]:
        ended = object()
        while True:
            with self.spinning.observing():
                if next(steps, ended) is ended:
                    return
            yield

    # ---- called on the engine's thread -------------------------------------------------------------------------------

    def run(self, device: torch.device) -> None:
        """Run batches on a device until `stop` is called.

        Raises:
            BaseException: A bug of the engine, or the device has failed. All jobs have failed.
        """
        self._steps.device = device
        try:
            use_device(device)
            with torch.no_grad():
                while not self._stop:
                    self._read_inbox()
                    self._drop_expired()
                    self._stop_early()
                    batch = self._scheduler.next_batch()
                    if batch is not None:
                        self._run_batch(batch)
                    else:
                        self._times.idle()
        except BaseException:  # no caller may wait for a result that never comes
            log.exception("the engine's thread failed")
            with self._closing:
                self.closed = True
            self._jobs |= self._arriving
            for job in [*self._jobs.values()]:
                self._finish(job, error=InternalError("the engine failed; the server's log contains the cause"))
            raise
        finally:
            self._steps.fail(shut_down())
            self._host.close()

    def _read_inbox(self) -> None:
        """Run the commands of other threads. If no row is owed, wait for a command or for the next deadline."""
        deadlines = [job.limits.deadline for job in self._jobs.values() if job.limits.deadline is not None]
        seconds = min(deadlines, default=math.inf) - time.monotonic()
        timeout = min(max(0.0, seconds), threading.TIMEOUT_MAX)
        commands = max(self._inbox.qsize(), 0 if len(self._scheduler) else 1)
        for _ in range(commands):
            try:
                command = self._inbox.get(timeout=timeout)
            except queue.Empty:
                return
            command()
            if self._stop:
                return

    def _halt(self) -> None:
        self._stop = True
        for job in [*self._jobs.values()]:
            self._end(job, error=shut_down())

    def _drop_expired(self) -> None:
        now = time.monotonic()
        for job in [j for j in self._jobs.values() if j.limits.deadline is not None and j.limits.deadline <= now]:
            self._end(job, error=expired(job, now))

    def _stop_early(self) -> None:
        """Answer a query that has `min_rows` if its request could not use the result of another batch in time."""
        if all(job.limits.answer_early_from is None for job in self._jobs.values()):
            return
        soon = self._times.next_end({job.lane for job in self._jobs.values() if job.lane and job.query})
        for job in [
            job
            for job in self._jobs.values()
            if job.limits.answer_early_from is not None and soon >= job.limits.answer_early_from
        ]:
            query = job.query
            if query is not None and query.min_rows is not None and job.query_done >= query.min_rows:
                job.late = True
                self._answer(job, query)

    def _begin(self, job: Job[Any]) -> None:
        self._jobs[job.id] = self._arriving.pop(job.id)
        for kind, size in job.batch_sizes.items():
            job.batch_sizes[kind] = self._runner.fitting_size(job.model.lane_key, kind, size)
        self._step(job, None)

    def _step(self, job: Job[Any], answer: Answer[Any] | None) -> None:
        """Run the plan until a query needs rows or another thread, or until the plan ends."""
        # Plans compute in full precision at each precision of the network. A CPU has no TF32.
        with gpu_arithmetic(tf32=False) if job.model.device.type == "cuda" else nullcontext():
            self._run_plan(job, answer)

    def _run_plan(self, job: Job[Any], answer: Answer[Any] | None) -> None:
        while True:
            try:
                # Python requires that the first value sent to a generator is None.
                query = job.context.run(job.plan.send, answer)  # type: ignore[arg-type]
                if torch.is_grad_enabled():
                    torch.set_grad_enabled(False)
                    raise RuntimeError("the plan left the grad mode on across a yield")
                if isinstance(query, Randomise) and self._copies.enqueue_if_full(job, query):
                    return
                if isinstance(query, OnHost):
                    self._host.call(job, query.function)
                    return
                answer = self._answer_without_rows(job, query) or self._schedule(job, query)
                if answer is None:
                    return
            except StopIteration as stop:
                self._end(job, result=stop.value)
                return
            except Exception as error:
                self._end(job, error=error)
                return

    def _answer_without_rows(self, job: Job[Any], query: Query[Any]) -> Answer[Any] | None:
        """Return the answer of a query that takes no rows, or None for a query that takes rows."""
        match query:
            case ClassWeights(index):
                return partial(job.network.class_weights, index)
            case WeightedLayers():
                return partial(weighted_layers, job.model)
            case Randomise():
                return partial(self._randomise, job, query)
            case ReleaseRows(rows):
                self._set_rows_owed(job, job.rows_owed - rows)
                notify_job(job, Progress(job.rows, job.rows + job.rows_left))
            case Report(event):
                notify_job(job, event)
            case _:
                return None
        return _no_value

    def _randomise(self, job: Job[Any], query: Randomise) -> None:
        """Apply the query inside the plan, so that an error is raised at the line of the query."""
        self._copies.randomise(job, query)
        if job.copy is None:
            self._inbox.put(self._grant_copies)  # deferred, because a plan is running

    def _grant_copies(self) -> None:
        """Resume the plans that wait for a random copy, as far as the limit permits."""
        while (first := self._copies.pop_next()) is not None:
            job, query = first
            self._step(job, partial(self._randomise, job, query))

    def _schedule(self, job: Job[Any], query: Query[Any]) -> Answer[Any] | None:
        """Give the query to the scheduler and return None, or return its answer if it may take no row."""
        copy = job.id if job.copy else 0
        lane, started = start_query(query, job.network, job.batch_sizes, copy, small_lanes=self._runner.padded)
        job.query_rows, job.query_done = started.rows, 0
        if started.min_rows is not None:
            early_from = job.limits.answer_early_from
            late = early_from is not None and self._times.next_end([lane]) >= early_from
            job.query_rows = job.permitted_rows(started.rows, started.min_rows, late=late)
            job.late |= late
        if not job.query_rows:
            self._set_rows_owed(job, job.rows_owed - started.rows)
            job.rows_at_early_stop = job.rows if started.rows else job.rows_at_early_stop
            return started.answer
        job.lane, job.query = lane, started
        self._scheduler.add(
            job.id,
            lane,
            job.query_rows,
            max_per_batch=min(started.max_per_batch, job.query_rows),
            later_rows=max(0, job.rows_left - job.query_rows),
            weight=job.weight,
        )
        return None

    def _set_rows_owed(self, job: Job[Any], rows: int) -> None:
        job.rows_owed = max(0, rows)
        self._admission.set_rows_owed(job.id, job.rows_left)

    def _run_batch(self, batch: Batch[Lane]) -> None:
        jobs = [self._jobs[rows.job] for rows in batch.ranges]
        model = jobs[0].network
        started = time.monotonic()
        for job in jobs:
            job.first_batch = job.first_batch or started
        slices = [
            BatchSlice(self._query(job), rows.start, rows.stop) for job, rows in zip(jobs, batch.ranges, strict=True)
        ]
        with self.spinning.observing(), self._interruption.running(jobs):
            failures = self._runner.run(model, batch.lane, slices)
        record = self._record(model, batch.lane, sum(each.stop - each.start for each in slices), started)
        for job, each in zip(jobs, slices, strict=True):
            if len(job.batch_records) < MAX_BATCH_RECORDS:
                job.batch_records.append((record, each.stop - each.start))
            self._advance(job, each, failures.get(id(each)))

    def _halve(self, model: Model, kind: LaneKind, size: int) -> None:
        """Reduce the size of later batches of a kind of lane, and note it in the receipts of running requests."""
        jobs = [job for job in self._jobs.values() if job.model.lane_key == model.lane_key]
        warning = f"memory ran out; later batches have {size} rows; a replay may therefore give different bits"
        for sizes in (model.batch_sizes, *(job.batch_sizes for job in jobs)):
            if kind in sizes:  # only a request that names its size has a small lane on some models
                sizes[kind] = min(sizes[kind], size)
        for job in jobs:
            job.context.run(log.warning, "out of memory, batch halved", model=model.name, lane=kind, size=size)
            if job.rows:
                notify_job(job, MapWarning(warning))

    def _advance(self, job: Job[Any], rows_run: BatchSlice, failure: Exception | None) -> None:
        if failure is not None:
            self._end(job, error=failure)
            return
        rows = rows_run.stop - rows_run.start
        job.rows += rows
        job.query_done = rows_run.stop
        job.batches += 1
        query = self._query(job)
        self._set_rows_owed(job, job.rows_owed - rows)
        notify_job(job, Progress(job.rows, job.rows + job.rows_left))
        if query.is_complete() or rows_run.stop >= job.query_rows:
            self._answer(job, query)

    def _answer(self, job: Job[Any], query: LaneQuery) -> None:
        """Send the answer to the plan. Rows of the query that have not run are no longer owed."""
        left = query.rows - job.query_done
        if not query.is_complete():
            job.rows_at_early_stop = job.rows
        self._set_rows_owed(job, job.rows_owed - left)
        self._scheduler.remove(job.id)
        job.query = None
        self._step(job, query.answer)

    def _end(self, job: Job[Any], *, result: Any = None, error: Exception | None = None) -> None:
        """Close the plan and set the result of its future."""
        if job.id not in self._jobs:
            return
        self._scheduler.remove(job.id)
        job.query = None
        try:
            job.plan.close()
        except Exception as broken:  # the plan yielded while it was closed
            error = error or broken
        self._finish(job, result=result, error=error)

    def _finish(self, job: Job[Any], *, result: Any = None, error: Exception | None = None) -> None:
        self._host.abandon(job)
        if self._copies.release(job):
            self._inbox.put(self._grant_copies)  # deferred, because a plan may be running
        del self._jobs[job.id]
        self._admission.release(job.id)
        job.finished = time.monotonic()
        set_outcome(job, result, error)

    def _query(self, job: Job[Any]) -> LaneQuery:
        assert job.query is not None, "a job with rows in a batch has a query"
        return job.query

    def _record(self, model: Model, lane: Lane, rows: int, started: float) -> BatchRecord:
        now = time.monotonic()
        padding = self._runner.padding_rows(model, lane, rows)
        record = BatchRecord(self.counters.batches + 1, lane.kind, rows, padding, started, now)
        self.counters.count(model, record)
        busy = self._times.busy
        seconds = self._times.add(lane, rows, started, now)
        full = rows + padding >= self._runner.batch_size(lane)  # smaller batches have a lower throughput
        if full and (busy or model.device.type == "cpu"):  # a GPU receives the first batch without running it at once
            model.throughput[lane.kind].observe(rows + padding, seconds)
        return record


def _no_value() -> None:
    return None
