"""Measures the batch times of an engine on this machine, and compares the simulation with that engine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import torch

from benchmarks.engine_runs import TimedJob, engine, submit
from benchmarks.machine import cpu_name
from benchmarks.results import Table
from benchmarks.simulation.events import Timeline
from benchmarks.simulation.profile import MethodCost, Profile, Step
from benchmarks.simulation.replica import Replica, Reply
from benchmarks.simulation.settings import Answer
from benchmarks.subjects import Subject
from benchmarks.timing import percentile
from camserve_server.engine.engine import Engine
from camserve_server.engine.lanes.dispatch import start_query
from camserve_server.models.model import PASSES, SMALL_KINDS, LaneKind, Model
from camserve_server.plan import (
    Ascend,
    Capture,
    Gradient,
    Plan,
    Predict,
    Query,
    ReleaseRows,
    Score,
    Sum,
)
from camserve_server.request_plan import MethodCall, plan_request, rows_needed

# Methods of the comparison, with few rows so that many requests take a minute on a CPU.
METHODS: dict[str, dict[str, Any]] = {"grad-cam": {}, "rise": {"masks": 48}, "opti-cam": {"steps": 10}}
SHARES = (0.7, 0.2, 0.1)
_TAKE_ROWS = (Predict, Capture, Score, Gradient, Ascend, Sum)


def measure(
    subject: Subject,
    step: Callable[[str], None] = lambda text: None,
    rounds: int = 2,
    methods: Mapping[str, Mapping[str, Any]] = METHODS,
) -> Profile:
    """Measure the batches of an idle engine on a CPU.

    Args:
        subject: The network.
        step: Called with a description before each measurement.
        rounds: Number of measurements of each batch, of which the median counts.
        methods: Methods of the profile with their parameters.

    Returns:
        The profile of the engine. Time outside of the engine counts as zero.
    """
    model = subject.model
    kinds: tuple[LaneKind, ...] = (*model.batch_sizes,)
    equal = {kind: model.equal_sizes.get(PASSES[kind], ()) for kind in kinds if kind not in SMALL_KINDS.values()}
    times: dict[LaneKind, dict[int, list[float]]] = {kind: {} for kind in kinds}
    with engine() as running:
        for size in sorted({size for kind in kinds for size in (model.batch_sizes[kind], *equal.get(kind, ()))}):
            step(f"{subject.name}: batches of {size} rows")
            for turn in range(rounds + 1):
                calls = [  # one after another, so that no batch contains rows of two requests
                    (subject.call("rise", masks=size), 1),
                    (subject.call("grad-cam"), size),
                    (subject.call("opti-cam", steps=2), size),
                ]
                jobs = []
                for call, targets in calls:
                    jobs.append(submit(running, model, subject.x, call, targets=(0,) * targets))
                    jobs[-1].wait()
                if turn:  # the first round warms up
                    _collect(jobs, times)
        costs, measured_s = {}, {}
        for name, parameters in methods.items():
            step(f"{subject.name}: {name} alone")
            call = subject.call(name, **parameters)
            costs[name], measured_s[name] = _method(running, subject, call, rounds)
    return Profile(
        f"{subject.name} on a CPU",
        f"The times were measured on {cpu_name()} with {torch.get_num_threads()} threads, without gRPC.",
        {kind: model.batch_sizes[kind] for kind in kinds},
        {kind: {size: median(values) for size, values in by_size.items()} for kind, by_size in times.items()},
        costs,
        equal_sizes=equal,
        measured_s=measured_s,
    )


def _collect(jobs: Sequence[TimedJob], times: dict[LaneKind, dict[int, list[float]]]) -> None:
    """Add the durations of all batches of the jobs, each batch once."""
    batches = {record.number: record for job in jobs for record, _ in _job(job).batch_records}
    for record in batches.values():
        times[record.kind].setdefault(record.rows + record.padding, []).append(record.finished - record.started)


def _method(running: Engine, subject: Subject, call: MethodCall, rounds: int) -> tuple[MethodCost, float]:
    """Return the costs of a method, and its median latency on the idle engine in seconds."""
    model, steps = subject.model, list[Step]()
    needed = rows_needed(model, call, (), 1)
    plan = _recorded(plan_request(model, subject.image, 1, call, ()), model, steps)
    running.submit(plan, model, rows=needed.most).future.result()
    seconds, plan_s = [], []
    for _ in range(rounds):
        timed = submit(running, model, subject.x, call)
        timed.wait()
        job = _job(timed)
        batches_s = sum(record.finished - record.started for record, _ in job.batch_records)
        if job.batches == len(job.batch_records):  # the engine keeps the first 16 records only
            plan_s.append(max(0.0, timed.seconds - batches_s))
        seconds.append(timed.seconds)
    return MethodCost(needed.most, needed.least, tuple(steps), median(plan_s or [0.0])), median(seconds)


def _recorded(plan: Plan[Any], model: Model, steps: list[Step]) -> Plan[Any]:
    """Run a plan, and append its queries that take rows to `steps`."""
    answer: Any = None
    released = 0
    while True:
        try:
            query: Query[Any] = plan.send(answer)
        except StopIteration as stop:
            return stop.value
        if isinstance(query, ReleaseRows):
            released += query.rows
        elif isinstance(query, _TAKE_ROWS):
            lane, started = start_query(query, model, model.batch_sizes)
            per_batch = started.max_per_batch if started.max_per_batch < started.rows else 0
            steps.append(Step(lane.kind, started.rows, per_batch, started.min_rows, released))
            released = 0
        answer = yield query


def _job(timed: TimedJob) -> Any:
    assert timed.job is not None, "submit has set the job"
    return timed.job


# ---- comparison ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request of the comparison: its time in seconds from the start, and its method."""

    at: float
    method: str


def arrivals(rate: float, requests: int, seed: int = 0) -> list[Arrival]:
    """Return requests of a Poisson process with the shares of the comparison."""
    choices, at = random.Random(seed), 0.0
    result = []
    for _ in range(requests):
        at += choices.expovariate(rate)
        result.append(Arrival(at, choices.choices([*METHODS], SHARES)[0]))
    return result


def run_real(subject: Subject, requests: Sequence[Arrival]) -> tuple[list[TimedJob], float]:
    """Send the requests to a real engine in real time.

    Returns:
        The finished jobs, and the rows per second from the first arrival to the last end.
    """
    calls = {name: subject.call(name, **parameters) for name, parameters in METHODS.items()}
    jobs = []
    with engine() as running:
        start = time.monotonic()
        for request in requests:
            time.sleep(max(0.0, start + request.at - time.monotonic()))
            jobs.append(submit(running, subject.model, subject.x, calls[request.method]))
        for timed in jobs:
            timed.wait()
        ended = [_job(timed).finished for timed in jobs]
    return jobs, sum(timed.rows for timed in jobs) / (max(ended) - start - requests[0].at)


def with_times_of(jobs: Sequence[TimedJob], profile: Profile) -> Profile:
    """Return the profile with the mean durations of the batches of these jobs, as far as such batches ran."""
    ran: dict[LaneKind, dict[int, list[float]]] = {kind: {} for kind in profile.batch_s}
    _collect(jobs, ran)
    means = {
        kind: {size: mean(ran[kind].get(size, [seconds])) for size, seconds in by_size.items()}
        for kind, by_size in profile.batch_s.items()
    }
    return replace(profile, batch_s=means)


def run_simulated(profile: Profile, requests: Sequence[Arrival]) -> tuple[list[float], float]:
    """Send the requests to a simulated engine.

    Returns:
        The latency of each request in seconds, and the rows per second as for `run_real`.
    """
    timeline, ended = Timeline(), [0.0] * len(requests)
    replica = Replica(timeline, profile)

    def send(number: int, request: Arrival) -> None:
        def end(reply: Reply) -> None:
            assert reply.error is None, "requests without a deadline on an engine with a short queue succeed"
            ended[number] = timeline.now

        replica.call(profile.methods[request.method], 1e9, end)

    for number, request in enumerate(requests):
        timeline.at(request.at, send, number, request)
    timeline.run()
    seconds = [end - request.at for end, request in zip(ended, requests, strict=True)]
    return seconds, replica.rows_run / (max(ended) - requests[0].at)


def validation(subject: Subject, step: Callable[[str], None], seconds: float = 60.0, load: float = 0.5) -> Answer:
    """Run the same requests in a real and in a simulated engine, and compare rows per second and latencies.

    Args:
        subject: The network of the real engine.
        step: Called with a description before each part.
        seconds: Approximate duration of the real run.
        load: Share of the time in which the engine is busy.
    """
    profile = measure(subject, step)
    alone_s = sum(share * profile.measured_s[name] for name, share in zip(METHODS, SHARES, strict=True))
    rate = load / alone_s
    requests = arrivals(rate, max(10, round(rate * seconds)))
    step(f"{subject.name}: {len(requests)} requests in real time")
    jobs, real_rate = run_real(subject, requests)
    real = [job.seconds for job in jobs]
    before, before_rate = run_simulated(profile, requests)
    after, after_rate = run_simulated(with_times_of(jobs, profile), requests)

    def row(title: str, values: tuple[float, float, float]) -> list[str]:
        real, *simulated = values
        return [title, f"{real:.0f}", *(cell for each in simulated for cell in (f"{each:.0f}", f"{each / real:.2f}"))]

    def all_of(summary: Callable[[Sequence[float]], float], numbers: Sequence[int]) -> tuple[float, float, float]:
        one, two, three = (1e3 * summary([values[number] for number in numbers]) for values in (real, before, after))
        return one, two, three

    rows = [row("rows per second", (real_rate, before_rate, after_rate))]
    for name in METHODS:
        if here := [number for number, request in enumerate(requests) if request.method == name]:
            rows.append(row(f"{name}, mean latency, ms", all_of(mean, here)))
    rows.append(row("all requests, median latency, ms", all_of(median, range(len(requests)))))
    rows.append(row("all requests, p90 latency, ms", all_of(lambda each: percentile(each, 0.9), range(len(requests)))))
    text = (
        f"{len(requests)} requests ({', '.join(f'{n} {s:.0%}' for n, s in zip(METHODS, SHARES, strict=True))}) with "
        f"random arrivals, {rate:.2f} per second, ran in a real engine with {subject.name} on this machine, which "
        "other processes used, too. They ran again in a simulated engine, with the batch times that were measured "
        "before, and with those of the real run itself, which contain the effect of the other processes on batches. "
        "RISE has 48 masks, Opti-CAM 10 steps."
    )
    columns = ["", "real", "simulated, times from before", "ratio", "simulated, times of the run", "ratio"]
    return Answer(text, [Table("", columns, rows)], [])
