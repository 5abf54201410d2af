"""Two replicas of Ray Serve, compared with two plain servers, on the same cores."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np

import camserve
from benchmarks.bench_setup import Bench
from benchmarks.machine import ROOT
from benchmarks.results import Claim, Findings, Result, Table
from benchmarks.service import BUDGET, MODEL, Load, callers, lane_size
from benchmarks.subjects import Subject, photograph
from benchmarks.timing import Timed, percentile

AIM = 0.95
COUNT = 2
# The loads with their callers. Grad-CAM is the request with the least work, so its overhead is the largest share.
LOADS = ((Load("score-cam", BUDGET), 8), (Load("grad-cam"), 8), (Load("score-cam", BUDGET), 1), (Load("grad-cam"), 1))

TEXT = (
    "Two replicas with one thread each behind the gRPC proxy of Ray Serve, and two `camserve serve` processes with one "
    "thread each, between which callers alternate. Both run all the time, and calls alternate between them, so that "
    "other processes disturb both alike. Callers, proxy and servers share the cores. A Score-CAM has a budget of "
    "{budget} rows. *Single request*: one caller, whose requests wait for nothing."
)


def section(bench: Bench) -> Result:
    """Measure the throughput with several callers and the latency of a single one."""
    findings = Findings()
    for subject in bench.subjects(MODEL):
        with ExitStack() as stack:
            bench.step("starting two servers")
            plain = [stack.enter_context(_process(subject, "serve")) for _ in range(COUNT)]
            bench.step("starting Ray Serve")
            ray = [stack.enter_context(_process(subject, "ray", "serve", "--replicas", str(COUNT)))]
            for load, count in LOADS:
                _measure(bench, findings, subject, {"plain": plain, "Ray Serve": ray}, load, count)
    return Result(
        "Ray Serve",
        TEXT.format(budget=BUDGET),
        claims=findings.claims,
        tables=[
            Table(
                "Median of the rounds; latencies in milliseconds, all rounds:",
                ["model", "method", "callers", "way", "requests/s", "p50", "p99"],
                findings.rows,
            )
        ],
    )


def _measure(
    bench: Bench, findings: Findings, subject: Subject, addresses: dict[str, list[str]], load: Load, count: int
) -> None:
    """Add the rates and latencies of one load with a number of callers."""
    latencies: dict[str, list[float]] = {way: [] for way in addresses}

    def side(way: str, call: Callable[[], int]) -> Timed:
        timed, times = callers(call, count, 4 * bench.seconds)
        latencies[way] += times
        return Timed(len(times), timed.seconds)

    with ExitStack() as stack:
        sides: dict[str, Callable[[], Timed]] = {}
        for way, targets in addresses.items():
            clients = [stack.enter_context(camserve.Client(each, timeout=None)) for each in targets]
            call = _call(clients, subject, load)
            for _ in range(2 * COUNT):
                call()
            sides[way] = partial(side, way, call)
        rates = bench.alternate(f"{count} callers of {load.method}", sides)
    for way, rate in rates.items():
        milliseconds = (f"{1e3 * percentile(latencies[way], share):.1f}" for share in (0.5, 0.99))
        findings.rows.append([subject.name, load.method, str(count), way, f"{rate.rate:.2f}", *milliseconds])
    if count > 1:
        share = rates["Ray Serve"].over(rates["plain"])
        claim = Claim(f"two replicas, {load.method}", "two plain servers", share, AIM, "share")
    else:
        medians = {way: percentile(times, 0.5) for way, times in latencies.items()}
        claim = Claim(
            f"latency of a single {load.method}", "a plain server", medians["Ray Serve"] / medians["plain"], None
        )
    findings.claims.append(claim)


def _call(clients: Sequence[camserve.Client], subject: Subject, load: Load) -> Callable[[], int]:
    """Return a function that sends a request to the next client in turn and returns the rows of its response."""
    turns, lock, pixels = cycle(clients), threading.Lock(), np.asarray(photograph())

    def call() -> int:
        with lock:
            client = next(turns)
        answer = client.explain(pixels, model=subject.name, method=load.method, budget=load.budget or None)
        return answer.cost.rows

    return call


@contextmanager
def _process(subject: Subject, *command: str) -> Iterator[str]:
    """Run a command of camserve that serves the model, and yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "camserve.toml"
        config.write_text(
            f'listen = "127.0.0.1:{port}"\ndevice = "cpu"\nthreads = 1\nlog_level = "error"\n\n[[models]]\n'
            f'name = "{subject.name}"\nsource = "{subject.model.source}"\nbatch_size = {lane_size(subject)}\n'
        )
        arguments = [sys.executable, "-m", "camserve_cli", *command, "--config", str(config)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=env) as process:
            try:
                assert process.stdout is not None
                ready = re.match(r"camserve is ready on (\S+), serving", process.stdout.readline())
                if ready is None:
                    raise RuntimeError("the server did not start; see its log above")
                yield ready[1]
            finally:
                process.terminate()
                process.wait()
