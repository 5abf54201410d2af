"""Jobs on an engine in this process, with their durations and profiles."""

from __future__ import annotations

import cProfile
import os
import pstats
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.timing import Timed, clock
from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Event, Job, Progress
from camserve_server.models.model import LaneKind, Model
from camserve_server.request_plan import MethodCall, MetricCall, limits, plan_request, rows_needed
from camserve_server.request_result import RequestResult

# Phases of the engine's work by the names of their functions. No function of the list calls another one.
PHASES = {
    "network": ("_wrapped_call_impl",),
    "backward pass": ("grad",),
    "creating rows": ("make",),
    "assembling batches": ("batch",),
    "reading scores": ("take", "move"),
    "plan": ("_step",),
}
IN_TORCH = ("network", "backward pass")


@dataclass(eq=False)
class TimedJob:
    """Job whose rows are timed.

    Attributes:
        model: The model of the job.
        after: Number of rows after which the timing starts.
        profile: Profiler that runs while the job is timed.
        started: Time in seconds and number of rows at the start of the timing.
        ended: Time in seconds at the end of the job.
        seen: Time in seconds and number of rows after each batch since the start of the timing.
        job: The job of the engine.
    """

    model: Model
    after: int
    profile: cProfile.Profile | None = None
    started: tuple[float, int] | None = None
    ended: float = 0.0
    seen: list[tuple[float, int]] = field(default_factory=list)
    job: Job[RequestResult] | None = field(default=None)

    def notify(self, event: Event) -> None:
        """Record progress. The engine calls it on its thread."""
        if self.started is None and isinstance(event, Progress) and event.rows_done >= self.after:
            self.started = (clock(self.model.device), event.rows_done)
            if self.profile is not None:
                self.profile.enable()
        if self.started is not None and isinstance(event, Progress):
            self.seen.append((time.perf_counter(), event.rows_done))

    def end(self, _: object) -> None:
        """Record the end of the job. The engine calls it on its thread."""
        if self.profile is not None:
            self.profile.disable()
        self.ended = clock(self.model.device)

    @property
    def timed(self) -> Timed:
        """Number and duration of the rows since the start of the timing."""
        assert self.job is not None
        assert self.started is not None, "the job ended before the timing started"
        start, before = self.started
        return Timed(self.job.rows - before, self.ended - start)

    @property
    def rows(self) -> int:
        """Number of rows of the finished job."""
        assert self.job is not None
        return self.job.rows

    @property
    def seconds(self) -> float:
        """Duration of the finished job in seconds, from its submission to its result."""
        assert self.job is not None
        return (self.job.queue_ms + self.job.compute_ms) / 1e3

    @property
    def before_s(self) -> float:
        """Duration in seconds from the submission to the start of the timing."""
        assert self.started is not None
        return self.seconds - (self.ended - self.started[0])

    @property
    def result(self) -> RequestResult:
        """Result of the job. Waits until the job is finished."""
        assert self.job is not None
        return self.job.future.result()

    def wait(self) -> None:
        """Wait until the job is finished. Raises the error of a failed job."""
        _ = self.result


def concurrent_rows(jobs: Sequence[TimedJob]) -> Timed:
    """Return the rows of concurrent jobs, from the time at which all are being timed to the end of the last one."""
    start = max(job.seen[0][0] for job in jobs)
    before = sum(max(rows for at, rows in job.seen if at <= start) for job in jobs)
    return Timed(sum(job.rows for job in jobs) - before, max(job.seen[-1][0] for job in jobs) - start)


@contextmanager
def engine(*, prepare: Callable[[Engine], None] = lambda engine: None) -> Iterator[Engine]:
    """Start an engine on its thread and stop it at the end."""
    running = Engine()
    prepare(running)
    running.start()
    try:
        yield running
    finally:
        running.close()


def submit(
    running: Engine,
    model: Model,
    x: Tensor,
    subject: MethodCall | Tensor,
    metrics: Sequence[MetricCall] = (),
    *,
    targets: Sequence[int] | int = 1,
    budget: int = 0,
    after: int = 2,
    batch_sizes: Mapping[LaneKind, int] | None = None,
    profile: cProfile.Profile | None = None,
) -> TimedJob:
    """Submit one request. The timing starts after the first rows: the prediction and the activations."""
    call = subject if isinstance(subject, MethodCall) else None
    needed = rows_needed(model, call, metrics, 1)
    timed_job = TimedJob(model, after, profile)
    timed_job.job = running.submit(
        plan_request(model, model.image(x), targets, subject, metrics),
        model,
        rows=needed.most,
        limits=limits(model, call, needed, budget=budget),
        batch_sizes=batch_sizes,
        notify=timed_job.notify,
    )
    timed_job.job.future.add_done_callback(timed_job.end)
    return timed_job


def run(model: Model, x: Tensor, subject: MethodCall | Tensor, *args: Any, **kwargs: Any) -> TimedJob:
    """Run one request on a new engine. On a GPU, a first run chooses the kernels of the engine's thread."""
    with engine() as running:
        if model.device.type == "cuda":
            submit(running, model, x, subject, *args, **{**kwargs, "profile": None}).wait()
        timed_job = submit(running, model, x, subject, *args, **kwargs)
        _ = timed_job.result
    return timed_job  # The thread of the engine has ended, so `end` has been called.


def time_profile(model: Model, x: Tensor, subject: MethodCall | Tensor, *args: Any, **kwargs: Any) -> str:
    """Return the shares of the engine's phases in one request, such as "profile: network 93%, …"."""
    profile = cProfile.Profile()
    run(model, x, subject, *args, **kwargs, profile=profile)
    stats = pstats.Stats(profile)
    times: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for (file, _, function), (_, _, _, whole, _) in stats.stats.items():  # type: ignore[attr-defined]
        for phase, names in PHASES.items():
            if function in names and (f"{os.sep}torch{os.sep}" in file) == (phase in IN_TORCH):
                times[phase] += whole
    total = stats.total_tt  # type: ignore[attr-defined]
    shares = {phase: seconds / total for phase, seconds in times.items()}
    shares["other"] = max(0.0, 1 - sum(shares.values()))
    return "profile: " + ", ".join(f"{phase} {share:.0%}" for phase, share in shares.items() if share >= 0.005)
