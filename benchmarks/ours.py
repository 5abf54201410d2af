"""Through the engine, in this process: jobs, how long they took, and where the time went."""

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
from camserve_server.request_plan import MethodCall, MetricCall, RequestResult, limits, plan_request, rows_needed

# What the engine's time goes to: functions by their names, none of which calls another of the list.
PHASES = {
    "the network": ("_wrapped_call_impl",),
    "the backward pass": ("grad",),
    "making rows": ("make",),
    "putting the batch together": ("batch",),
    "reading scores": ("take", "move"),
    "the plan": ("_step",),
}
IN_TORCH = ("the network", "the backward pass")


@dataclass(eq=False)
class Watched:
    """A job, and when its rows were done: (seconds, rows so far) from the batch on that made them `after`."""

    model: Model
    after: int
    profile: cProfile.Profile | None = None
    started: tuple[float, int] | None = None
    ended: float = 0.0
    seen: list[tuple[float, int]] = field(default_factory=list)  # from then on: when there were how many rows
    job: Job[RequestResult] | None = field(default=None)

    def notify(self, event: Event) -> None:
        """On the engine's thread."""
        if self.started is None and isinstance(event, Progress) and event.rows_done >= self.after:
            self.started = (clock(self.model.device), event.rows_done)
            if self.profile is not None:
                self.profile.enable()
        if self.started is not None and isinstance(event, Progress):
            self.seen.append((time.perf_counter(), event.rows_done))

    def end(self, _: object) -> None:
        """On the engine's thread, when the result is there."""
        if self.profile is not None:
            self.profile.disable()
        self.ended = clock(self.model.device)

    @property
    def timed(self) -> Timed:
        """From the end of the batch that was to be waited for."""
        assert self.job is not None
        assert self.started is not None, "the job has had more rows than are to be waited for"
        start, before = self.started
        return Timed(self.job.rows - before, self.ended - start)

    @property
    def rows(self) -> int:
        """Once it is done."""
        assert self.job is not None
        return self.job.rows

    @property
    def seconds(self) -> float:
        """From the submission to the result, once it is there."""
        assert self.job is not None
        return (self.job.queue_ms + self.job.compute_ms) / 1e3

    @property
    def before_s(self) -> float:
        """From the submission to there."""
        assert self.started is not None
        return self.seconds - (self.ended - self.started[0])

    @property
    def result(self) -> RequestResult:
        """Once it is there."""
        assert self.job is not None
        return self.job.future.result()

    def wait(self) -> None:
        """Until the result is there. Raises if there is none."""
        _ = self.result


def together(jobs: Sequence[Watched]) -> Timed:
    """Of jobs that run side by side: from when all of them are past what is not counted, to the last one's end."""
    start = max(job.seen[0][0] for job in jobs)
    before = sum(max(rows for at, rows in job.seen if at <= start) for job in jobs)
    return Timed(sum(job.rows for job in jobs) - before, max(job.seen[-1][0] for job in jobs) - start)


@contextmanager
def engine(*, prepare: Callable[[Engine], None] = lambda engine: None) -> Iterator[Engine]:
    """Runs on its thread, which ends with it."""
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
) -> Watched:
    """One request; x is preprocessed. `after` so many rows the clock starts: the prediction and the activations."""
    call = subject if isinstance(subject, MethodCall) else None
    needed = rows_needed(model, call, metrics, 1)
    watched = Watched(model, after, profile)
    watched.job = running.submit(
        plan_request(model, model.image(x), targets, subject, metrics),
        model,
        rows=needed.most,
        limits=limits(model, call, needed, budget=budget),
        batch_sizes=batch_sizes,
        notify=watched.notify,
    )
    watched.job.future.add_done_callback(watched.end)
    return watched


def run(model: Model, x: Tensor, subject: MethodCall | Tensor, *args: Any, **kwargs: Any) -> Watched:
    """One request on an engine of its own."""
    with engine() as running:
        watched = submit(running, model, x, subject, *args, **kwargs)
        _ = watched.result
    return watched  # the engine's thread has ended, so `end` has been called


def where(model: Model, x: Tensor, subject: MethodCall | Tensor, *args: Any, **kwargs: Any) -> str:
    """Where the engine's time goes, by a profile of one request: "the network 93 %, …"."""
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
    shares["the rest"] = max(0.0, 1 - sum(shares.values()))
    return "a profile: " + ", ".join(f"{phase} {share:.0%}" for phase, share in shares.items() if share >= 0.005)
