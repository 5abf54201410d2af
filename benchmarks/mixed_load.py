"""Mixed load: latency of Grad-CAM while PCAM± saturates the device, with two schedulers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from benchmarks import engine_runs
from benchmarks.bench_setup import Bench
from benchmarks.engine_runs import TimedJob
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject
from benchmarks.timing import percentile
from camserve_server.engine.engine import Engine
from camserve_server.engine.scheduler import Batch, RowRange

AIM = 20.0
MODEL = "efficientnet-lite0"
LONG = 2  # number of PCAM± callers
EVERY_S = 0.25  # mean interval of Grad-CAM requests in seconds

TEXT = (
    "Grad-CAM requests arrive at random, every {interval} s on average, while {callers} callers keep the engine busy "
    "with PCAM±. A PCAM± has a budget of {budget} rows, because the latency of first come, first served grows with "
    "its rows; a complete one has several times as many."
)
Lane = TypeVar("Lane", bound=Hashable)


@dataclass
class _Query(Generic[Lane]):
    lane: Lane
    rows: int
    max_per_batch: int
    cursor: int = 0


class FirstCome(Generic[Lane]):
    """Scheduler that gives every batch to the oldest request until it is finished."""

    def __init__(self, size: Callable[[Lane], int]) -> None:
        self._size = size
        self._queries: dict[int, _Query[Lane]] = {}

    def __len__(self) -> int:
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
        """Add rows, like the scheduler of the engine."""
        self._queries[job] = _Query(lane, rows, max_per_batch or rows)

    def remove(self, job: int) -> None:
        """Remove a job, like the scheduler of the engine."""
        self._queries.pop(job, None)

    def next_batch(self) -> Batch[Lane] | None:
        """Return rows of the oldest request. Job ids increase with time."""
        if not self._queries:
            return None
        job = min(self._queries)
        query = self._queries[job]
        start = query.cursor
        rows = min(self._size(query.lane), query.max_per_batch, query.rows - start)
        query.cursor += rows
        if query.cursor == query.rows:
            del self._queries[job]
        return Batch(query.lane, (RowRange(job, start, start + rows),))


def first_come(engine: Engine) -> None:
    """Replace the scheduler of an engine that has not started."""
    engine._loop._scheduler = FirstCome(engine._loop._runner.batch_size)  # type: ignore[assignment]


def continuous(engine: Engine) -> None:
    """Keep the scheduler of the engine."""


SCHEDULERS: dict[str, Callable[[Engine], None]] = {
    "continuous batching": continuous,
    "first come, first served": first_come,
}


def section(bench: Bench) -> Result:
    """Measure both schedulers alternately, and Grad-CAM alone."""
    findings = Findings()
    budget = 0
    for subject in bench.subjects(MODEL):
        budget = max(8, round(2 * bench.seconds * subject.limit.rate))
        _measure(bench, findings, subject, budget)
    return Result(
        "Mixed load",
        TEXT.format(interval=EVERY_S, callers=LONG, budget=budget),
        claims=findings.claims,
        tables=[
            Table(
                "Latency of Grad-CAM in milliseconds, all rounds:",
                ["model", "scheduler", "Grad-CAMs", "p50", "p99", "max.", "all rows/s"],
                findings.rows,
            )
        ],
        charts=[Chart("Grad-CAM while PCAM± saturates the device", "milliseconds", findings.bars, logarithmic=True)],
    )


def _measure(bench: Bench, findings: Findings, subject: Subject, budget: int) -> None:
    waits: dict[str, list[float]] = {"alone": [], **{way: [] for way in SCHEDULERS}}
    rates: dict[str, list[float]] = {way: [] for way in waits}
    seconds = 10 * bench.seconds
    for turn in range(bench.rounds):
        for way, prepare in SCHEDULERS.items():
            bench.step(f"{subject.name}: mixed load, {way}")
            with engine_runs.engine(prepare=prepare) as running:
                got, rate = load(running, subject, budget, seconds, LONG, seed=turn)
            waits[way] += got
            rates[way].append(rate)
    bench.step(f"{subject.name}: Grad-CAM alone")
    with engine_runs.engine() as running:
        waits["alone"], rate = load(running, subject, budget, seconds / 3, 0, seed=0)
        rates["alone"].append(rate)
    p99 = {way: percentile(times, 0.99) for way, times in waits.items()}
    ratio = p99["first come, first served"] / p99["continuous batching"]
    because = (
        f"a PCAM± of {budget} rows is short; a Grad-CAM takes {p99['alone']:.2f} s alone, "
        f"{p99['continuous batching']:.2f} s during PCAM±, and {p99['first come, first served']:.2f} s behind it"
    )
    findings.claims.append(
        Claim("Grad-CAM during PCAM± load, p99 latency", "first come, first served", ratio, AIM, because=because)
    )
    findings.bars["p50"] = {way: 1e3 * percentile(times, 0.5) for way, times in waits.items()}
    findings.bars["p99"] = {way: 1e3 * value for way, value in p99.items()}
    for way, times in waits.items():
        ms = [f"{1e3 * value:.0f}" for value in (percentile(times, 0.5), p99[way], max(times))]
        rate = sum(rates[way]) / len(rates[way])
        findings.rows.append([subject.name, way, str(len(times)), *ms, f"{rate:.1f}"])


def load(
    running: Engine, subject: Subject, budget: int, seconds: float, long: int, seed: int
) -> tuple[list[float], float]:
    """Return the latency of each Grad-CAM in seconds and the rate of all rows per second."""
    over = threading.Event()
    call = subject.call("poly-cam")

    def saturate() -> None:
        while not over.is_set():
            engine_runs.submit(running, subject.model, subject.x, call, budget=budget, after=0).wait()

    threads = [threading.Thread(target=saturate) for _ in range(long)]
    for thread in threads:
        thread.start()
    intervals = random.Random(seed)
    start = time.perf_counter()
    jobs: list[TimedJob] = []
    while time.perf_counter() < start + seconds:
        time.sleep(min(intervals.expovariate(1 / EVERY_S), seconds))
        jobs.append(engine_runs.submit(running, subject.model, subject.x, subject.call("grad-cam"), after=0))
    rows, took = running.counters.rows, time.perf_counter() - start
    for job in jobs:
        job.wait()
    over.set()
    for thread in threads:
        thread.join()
    return [job.seconds for job in jobs], rows / took
