"""Service on loopback with 16 callers, compared with as many callers of an engine in their own process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import camserve
from benchmarks import engine_runs
from benchmarks.bench_setup import Bench
from benchmarks.engine_runs import TimedJob
from benchmarks.machine import ROOT
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject, from_config, photograph
from benchmarks.timing import Timed, percentile
from camserve_server.config import ModelConfig
from camserve_server.engine.engine import Engine
from camserve_server.models.model import Passes

AIM = 0.97
MODEL = "efficientnet-lite0"
BUDGET = 32  # rows of a Score-CAM, so that each caller gets several responses during the measurement

TEXT = (
    "{callers} callers send their next request after each response: over gRPC to a server process on the "
    "same machine, and directly to an engine in a separate process. All images are sent as pixels and preprocessed "
    "for each request. Callers, server and engine share the cores. A Score-CAM has a budget of {budget} rows."
)


@dataclass(frozen=True)
class Load:
    """Request that each caller repeats."""

    method: str
    budget: int = 0
    targets: int = 1


LOADS = (Load("grad-cam"), Load("score-cam", BUDGET))


def section(bench: Bench) -> Result:
    """Measure both loads over gRPC and in process, alternately."""
    findings = Findings()
    for subject in bench.subjects(MODEL):
        bench.step("starting a server")
        with server(subject, bench.device.type) as address:
            measure(bench, findings, subject, address)
    return Result(
        "Service",
        TEXT.format(callers=bench.callers, budget=BUDGET),
        claims=findings.claims,
        tables=[
            Table(
                "Median of the rounds; latencies in milliseconds, all rounds:",
                ["model", "method", "way", "requests/s", "rows/s", "share of plain pass", "p50", "p99"],
                findings.rows,
            )
        ],
        charts=[Chart(f"{bench.callers} callers", "rows per second", findings.bars)],
    )


def measure(bench: Bench, findings: Findings, subject: Subject, address: str) -> None:
    """Add the rates of a server that serves this model and of an engine in process."""
    pixels = np.asarray(photograph())
    maps = {}
    with camserve.Client(address, timeout=None) as client:
        for load in LOADS:

            def through_grpc(load: Load = load) -> camserve.Explanation:
                return _explained(client, subject, load, pixels)

            maps["grpc"] = through_grpc().saliency
            with engine_runs.engine() as running:
                job = _submitted(running, subject, subject.x, load)
                maps["engine"] = job.result.maps[0].numpy()
            agree = f"maps within {np.abs(maps['grpc'] - maps['engine']).max():.0e}"
            _measure(bench, findings, subject, load, through_grpc, agree)


def _measure(
    bench: Bench,
    findings: Findings,
    subject: Subject,
    load: Load,
    through_grpc: Callable[[], camserve.Explanation],
    agree: str,
) -> None:
    latencies: dict[str, list[float]] = {"in process": [], "gRPC": []}
    requests: dict[str, list[float]] = {"in process": [], "gRPC": []}

    seconds = 4 * bench.seconds

    def record(way: str, timed: Timed, times: list[float]) -> Timed:
        latencies[way] += times
        requests[way].append(len(times) / timed.seconds)
        return timed

    def directly() -> Timed:
        config = subject.config.model_copy(update={"batch_size": lane_size(subject)})
        return record("in process", *bench.separate_as_served(in_process, config, load, bench.callers, seconds))

    def over_grpc() -> Timed:
        return record("gRPC", *callers(lambda: through_grpc().cost.rows, bench.callers, seconds))

    sides = {"in process": directly, "gRPC": over_grpc}
    with_plain = {"plain pass": subject.limit.side(bench.seconds), **sides}
    rates = bench.alternate(f"{bench.callers} callers of {load.method}", with_plain)
    share = rates["gRPC"].over(rates["in process"])
    because = "callers, service threads and engine share the cores, and gRPC adds work"
    findings.claims.append(Claim(f"{load.method} over gRPC, rate", "in process", share, AIM, "share", agree, because))
    findings.bars[load.method] = {way: rates[way].rate for way in sides}
    for way in sides:
        times, rate = latencies[way], rates[way]
        each = f"{sorted(requests[way])[len(requests[way]) // 2]:.1f}"
        cells = [subject.name, load.method, way, each, f"{rate.rate:.1f}", f"{rate.over(rates['plain pass']):.2f}"]
        findings.rows.append([*cells, *(f"{1e3 * percentile(times, share):.0f}" for share in (0.5, 0.99))])


def callers(call: Callable[[], int], count: int, seconds: float) -> tuple[Timed, list[float]]:
    """Call a function repeatedly on several threads. Return the rows and the latency of each call in seconds."""
    rows: list[int] = []
    times: list[float] = []
    failures: list[Exception] = []
    start = time.perf_counter()

    def caller() -> None:
        try:
            while not times or time.perf_counter() < start + seconds:
                began = time.perf_counter()
                done = call()
                times.append(time.perf_counter() - began)
                rows.append(done)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=caller) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Timed(sum(rows), time.perf_counter() - start), times


def in_process(config: ModelConfig, device: str, load: Load, count: int, seconds: float) -> tuple[Timed, list[float]]:
    """Run the load on an engine in this process. The process must have no other work, like that of a server."""
    subject = _subject(config.model_dump_json(), device)
    with engine_runs.engine() as running:
        return callers(lambda: _request(running, subject, load), count, seconds)


@cache
def _subject(config: str, device: str) -> Subject:
    return from_config(ModelConfig.model_validate_json(config), torch.device(device), 0.0)


def _request(running: Engine, subject: Subject, load: Load) -> int:
    """Run one request, including the preprocessing that the service does."""
    x = subject.model.preprocessing(np.asarray(photograph()))
    timed_job = _submitted(running, subject, x, load)
    timed_job.wait()
    return timed_job.rows


def _submitted(running: Engine, subject: Subject, x: Tensor, load: Load) -> TimedJob:
    """Submit one request with the batch sizes of the server."""
    sizes = dict.fromkeys(get_args(Passes), lane_size(subject))
    return engine_runs.submit(
        running, subject.model, x, subject.call(load.method), budget=load.budget, after=0, batch_sizes=sizes
    )


def lane_size(subject: Subject) -> int:
    """Return the batch size of all lanes of the server. The configuration has a single value for them."""
    return subject.model.batch_sizes["forward"]


def _explained(
    client: camserve.Client, subject: Subject, load: Load, pixels: NDArray[np.uint8]
) -> camserve.Explanation:
    return client.explain(pixels, model=subject.name, method=load.method, budget=load.budget or None)


@contextmanager
def server(subject: Subject, device: str) -> Iterator[str]:
    """Run `camserve serve` as a process and yield its address."""
    with running(
        f'listen = "127.0.0.1:0"\ndevice = "{device}"\nlog_level = "error"\n\n[[models]]\n'
        f'name = "{subject.name}"\nsource = "{subject.model.source}"\nbatch_size = {lane_size(subject)}\n'
        f"input_size = {[*subject.config.input_size]}\n"
        f'precision = "{subject.model.precision}"\ncompile = {str(subject.model.compile).lower()}\n'
    ) as address:
        yield address


@contextmanager
def running(config: str, **variables: str) -> Iterator[str]:
    """Run `camserve serve` with a configuration in TOML as a process, and yield its address once it is ready.

    Args:
        config: The configuration.
        **variables: Environment variables.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "camserve.toml"
        path.write_text(config, encoding="utf-8")
        command = [sys.executable, "-m", "camserve_cli", "serve", "--config", str(path)]
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": python_path, **variables}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
            try:
                assert process.stdout is not None, "it is a pipe"
                ready = re.match(r"camserve is ready on (\S+), serving", process.stdout.readline())
                if ready is None:
                    raise RuntimeError("the server did not start; see its log above")
                yield ready[1]
            finally:
                process.terminate()
