"""Mixed load: how long a Grad-CAM waits while PCAM± saturates the device, by who goes first."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from benchmarks import ours
from benchmarks.ours import Watched
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject
from benchmarks.timing import percentile
from benchmarks.work import Bench
from camserve_server.engine.engine import Engine
from camserve_server.engine.scheduler import Batch, RowRange

AIM = 20.0
MODEL = "efficientnet-lite0"
LONG = 2  # callers of PCAM±
EVERY_S = 0.25  # a Grad-CAM comes, on average

Lane = TypeVar("Lane", bound=Hashable)


@dataclass
class _Question(Generic[Lane]):
    lane: Lane
    rows: int
    max_per_batch: int
    cursor: int = 0


class FirstCome(Generic[Lane]):
    """First come, first served: the oldest request has every batch until it is done. In place of the scheduler."""

    def __init__(self, size: Callable[[Lane], int]) -> None:
        self._size = size
        self._questions: dict[int, _Question[Lane]] = {}

    def __len__(self) -> int:
        return len(self._questions)

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
        """As the scheduler's."""
        self._questions[job] = _Question(lane, rows, max_per_batch or rows)

    def remove(self, job: int) -> None:
        """As the scheduler's."""
        self._questions.pop(job, None)

    def next_batch(self) -> Batch[Lane] | None:
        """Rows of the request that came first; ids are given in order."""
        if not self._questions:
            return None
        job = min(self._questions)
        question = self._questions[job]
        start = question.cursor
        rows = min(self._size(question.lane), question.max_per_batch, question.rows - start)
        question.cursor += rows
        if question.cursor == question.rows:
            del self._questions[job]
        return Batch(question.lane, (RowRange(job, start, start + rows),))


def first_come(engine: Engine) -> None:
    """Before it starts."""
    engine._scheduler = FirstCome(engine._runner.batch_size)  # type: ignore[assignment]


def continuous(engine: Engine) -> None:
    """As it is."""


WAYS: dict[str, Callable[[Engine], None]] = {"continuous batching": continuous, "first come, first served": first_come}


def section(bench: Bench) -> Result:
    """Both ways, in turn, and Grad-CAM alone."""
    found = Findings()
    budget = 0
    for subject in bench.subjects(MODEL):
        budget = max(8, round(2 * bench.seconds * subject.limit.rate))
        _measure(bench, found, subject, budget)
    return Result(
        "Mixed load",
        f"Grad-CAMs come every {EVERY_S} s on average, at random times, while {LONG} callers keep the engine busy with "
        f"PCAM±, in this process. So that first come, first served can be measured at all, a PCAM± has a budget of "
        f"{budget} rows; a whole one has several times as many, and what a Grad-CAM waits for grows with that.",
        claims=found.claims,
        tables=[
            Table(
                "Latency of Grad-CAM in milliseconds, of all rounds:",
                ["model", "scheduler", "Grad-CAMs", "p50", "p99", "longest", "all rows/s"],
                found.rows,
            )
        ],
        charts=[Chart("Grad-CAM while PCAM± saturates the device", "milliseconds", found.bars, logarithmic=True)],
    )


def _measure(bench: Bench, found: Findings, subject: Subject, budget: int) -> None:
    waits: dict[str, list[float]] = {"alone": [], **{way: [] for way in WAYS}}
    rates: dict[str, list[float]] = {way: [] for way in waits}
    seconds = 10 * bench.seconds
    for turn in range(bench.rounds):
        for way, prepare in WAYS.items():
            bench.step(f"{subject.name}: mixed load, {way}")
            with ours.engine(prepare=prepare) as running:
                got, rate = load(running, subject, budget, seconds, LONG, seed=turn)
            waits[way] += got
            rates[way].append(rate)
    bench.step(f"{subject.name}: Grad-CAM alone")
    with ours.engine() as running:
        waits["alone"], rate = load(running, subject, budget, seconds / 3, 0, seed=0)
        rates["alone"].append(rate)
    p99 = {way: percentile(times, 0.99) for way, times in waits.items()}
    ratio = p99["first come, first served"] / p99["continuous batching"]
    because = (
        f"a PCAM± of {budget} rows is short; beside it a Grad-CAM takes {p99['continuous batching']:.2f} s in place of "
        f"{p99['alone']:.2f} s alone, and {p99['first come, first served']:.2f} s if it has to wait"
    )
    found.claims.append(
        Claim("Grad-CAM beside PCAM±, p99 lower", "first come, first served", ratio, AIM, because=because)
    )
    found.bars["p50"] = {way: 1e3 * percentile(times, 0.5) for way, times in waits.items()}
    found.bars["p99"] = {way: 1e3 * value for way, value in p99.items()}
    for way, times in waits.items():
        ms = [f"{1e3 * value:.0f}" for value in (percentile(times, 0.5), p99[way], max(times))]
        rate = sum(rates[way]) / len(rates[way])
        found.rows.append([subject.name, way, str(len(times)), *ms, f"{rate:.1f}"])


def load(
    running: Engine, subject: Subject, budget: int, seconds: float, long: int, seed: int
) -> tuple[list[float], float]:
    """Seconds that each Grad-CAM took from its submission on, and rows a second of all."""
    over = threading.Event()
    call = subject.call("poly-cam")

    def saturate() -> None:
        while not over.is_set():
            ours.submit(running, subject.model, subject.x, call, budget=budget, after=0).wait()

    threads = [threading.Thread(target=saturate) for _ in range(long)]
    for thread in threads:
        thread.start()
    chance = random.Random(seed)
    start = time.perf_counter()
    jobs: list[Watched] = []
    while time.perf_counter() < start + seconds:
        time.sleep(min(chance.expovariate(1 / EVERY_S), seconds))
        jobs.append(ours.submit(running, subject.model, subject.x, subject.call("grad-cam"), after=0))
    rows, took = running.counters.rows, time.perf_counter() - start
    for job in jobs:
        job.wait()
    over.set()
    for thread in threads:
        thread.join()
    return [job.seconds for job in jobs], rows / took
