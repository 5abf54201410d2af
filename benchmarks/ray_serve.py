"""Two replicas of Ray Serve, compared with two plain servers, on the same cores."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

import camserve
from benchmarks.bench_setup import Bench
from benchmarks.machine import ROOT
from benchmarks.results import Claim, Findings, Result, Table
from benchmarks.service import BUDGET, MODEL, Load, callers
from benchmarks.subjects import photograph
from benchmarks.timing import Timed, percentile

AIM = 0.95
COUNT = 2
IDLE_S = 10.0
BATCH_SIZE = 8
# The loads with their callers. Grad-CAM is the request with the least work, so its overhead is the largest share.
LOADS = ((Load("score-cam", BUDGET), 8), (Load("grad-cam"), 8), (Load("score-cam", BUDGET), 1), (Load("grad-cam"), 1))

TEXT = (
    "Two replicas with one thread each behind the gRPC proxy of Ray Serve, and two `camserve serve` processes with one "
    "thread each, between which callers alternate. Both run all the time, and calls alternate between them, so that "
    "other processes disturb both alike. Callers, proxy and servers share the cores. A Score-CAM has a budget of "
    "{budget} rows. With one caller, requests wait for nothing. *CPU*: time of all processes of the servers or of Ray "
    "for a request, without what the idle processes use, which other processes on the machine change less than rates. "
    "The idle processes of Ray use {idle:.0f} % of a core."
)


class Served(NamedTuple):
    """A command that serves the model: its address and its process."""

    address: str
    pid: int


def section(bench: Bench) -> Result:
    """Measure the throughput with several callers and the latency of a single one."""
    findings = Findings()
    with ExitStack() as stack:
        bench.step("starting two servers")
        plain = [stack.enter_context(_process("serve")) for _ in range(COUNT)]
        bench.step("starting Ray Serve")
        ray = [stack.enter_context(_process("ray", "serve", "--replicas", str(COUNT)))]
        served = {"plain": plain, "Ray Serve": ray}
        idle_shares = {way: _idle(each) for way, each in served.items()}
        idle = idle_shares["Ray Serve"]
        for load, count in LOADS:
            _measure(bench, findings, served, idle_shares, load, count)
    return Result(
        "Ray Serve",
        TEXT.format(budget=BUDGET, idle=100 * idle),
        claims=findings.claims,
        tables=[
            Table(
                "Median of the rounds; latencies in milliseconds, all rounds:",
                ["model", "method", "callers", "way", "requests/s", "p50", "p99", "CPU"],
                findings.rows,
            )
        ],
    )


def _measure(
    bench: Bench,
    findings: Findings,
    served: dict[str, list[Served]],
    idle_shares: dict[str, float],
    load: Load,
    count: int,
) -> None:
    """Add the rates and latencies of one load with a number of callers."""
    latencies: dict[str, list[float]] = {way: [] for way in served}
    cpu: dict[str, list[float]] = {way: [] for way in served}

    def side(way: str, call: Callable[[], int]) -> Timed:
        idle, before = idle_shares[way], _cpu_s(served[way])
        timed, times = callers(call, count, 4 * bench.seconds)
        latencies[way] += times
        cpu[way].append((_cpu_s(served[way]) - before - idle * timed.seconds) / len(times))
        return Timed(len(times), timed.seconds)

    with ExitStack() as stack:
        sides: dict[str, Callable[[], Timed]] = {}
        for way, targets in served.items():
            clients = [stack.enter_context(camserve.Client(each.address, timeout=None)) for each in targets]
            call = _call(clients, load)
            for _ in range(2 * COUNT):
                call()
            sides[way] = partial(side, way, call)
        rates = bench.alternate(f"{count} callers of {load.method}", sides)
    for way, rate in rates.items():
        milliseconds = [percentile(latencies[way], 0.5), percentile(latencies[way], 0.99), median(cpu[way])]
        cells = [MODEL, load.method, str(count), way, f"{rate.rate:.2f}"]
        findings.rows.append([*cells, *(f"{1e3 * each:.1f}" for each in milliseconds)])
    name = f"{count} callers of {load.method}" if count > 1 else f"one {load.method} at a time"
    share = rates["Ray Serve"].over(rates["plain"])
    findings.claims.append(
        Claim(
            f"two replicas, {name}, rate",
            "two plain servers",
            share,
            AIM if count > 1 else None,
            "share",
            because="the proxy receives and sends each message once more, and shares the cores with the replicas",
        )
    )
    more = median(cpu["Ray Serve"]) - median(cpu["plain"])
    print(f"{name}: {1e3 * more:.1f} ms more CPU for a request", file=sys.stderr)


def _cpu_s(served: Sequence[Served]) -> float:
    """Return the CPU seconds of processes with all their descendants that run."""
    total, left = 0.0, [each.pid for each in served]
    while left:
        pid = left.pop()
        with suppress(OSError):  # it has ended
            total += time.clock_gettime(~pid << 3 | 2)  # CPU clock of another process, as in libc
            for thread in Path(f"/proc/{pid}/task").iterdir():
                left += [int(child) for child in (thread / "children").read_text().split()]
    return total


def _idle(served: Sequence[Served]) -> float:
    """Return the CPU seconds per second of idle processes."""
    before, start = _cpu_s(served), time.perf_counter()
    time.sleep(IDLE_S)
    return (_cpu_s(served) - before) / (time.perf_counter() - start)


def _call(clients: Sequence[camserve.Client], load: Load) -> Callable[[], int]:
    """Return a function that sends a request to the next client in turn and returns the rows of its response."""
    turns, lock, pixels = cycle(clients), threading.Lock(), np.asarray(photograph())

    def call() -> int:
        with lock:
            client = next(turns)
        answer = client.explain(pixels, model=MODEL, method=load.method, budget=load.budget or None)
        return answer.cost.rows

    return call


@contextmanager
def _process(*command: str) -> Iterator[Served]:
    """Run a command of camserve that serves the model, and yield it when it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "camserve.toml"
        config.write_text(
            f'listen = "127.0.0.1:{port}"\ndevice = "cpu"\nthreads = 1\nlog_level = "error"\n\n[[models]]\n'
            f'name = "{MODEL}"\nsource = "embedded:{MODEL}"\nbatch_size = {BATCH_SIZE}\n'
        )
        arguments = [sys.executable, "-m", "camserve_cli", *command, "--config", str(config)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=env) as process:
            try:
                assert process.stdout is not None
                ready = re.match(r"camserve is ready on (\S+), serving", process.stdout.readline())
                if ready is None:
                    raise RuntimeError("the server did not start; see its log above")
                yield Served(ready[1], process.pid)
            finally:
                process.terminate()
                process.wait()
