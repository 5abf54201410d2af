"""The service: a server process on loopback with 16 callers, against as many callers of an engine in this process."""

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
from benchmarks import ours
from benchmarks.machine import ROOT
from benchmarks.ours import Watched
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject, from_config, photograph
from benchmarks.timing import Timed, percentile
from benchmarks.work import Bench
from camserve_server.config import ModelConfig
from camserve_server.engine.engine import Engine
from camserve_server.models.model import LaneKind
from camserve_server.models.pixels import from_pixels

AIM = 0.97
MODEL = "efficientnet-lite0"
BUDGET = 32  # rows of a Score-CAM, so that each caller gets several answers in the time


@dataclass(frozen=True)
class Load:
    """What each caller asks for, again and again."""

    method: str
    budget: int = 0
    targets: int = 1


LOADS = (Load("grad-cam"), Load("score-cam", BUDGET))
Call = Callable[[Load], int]  # rows that it took


def section(bench: Bench) -> Result:
    """Both loads, both ways, in turn."""
    found = Findings()
    for subject in bench.subjects(MODEL):
        bench.step("starting a server")
        with server(subject, bench.device.type) as address:
            measure(bench, found, subject, address)
    return Result(
        "The service",
        f"{bench.callers} callers, each with the next request as soon as the last is answered, over gRPC to a server "
        "process on the same machine, and as calls of an engine in their own process that get the same picture as "
        "pixels. Both resize and normalise it; over gRPC it is sent, and the map and the receipt are sent back, on the "
        f"same cores that the engine has. A Score-CAM here has a budget of {BUDGET} rows.",
        claims=found.claims,
        tables=[
            Table(
                "Median of the rounds; latencies in milliseconds, of all rounds:",
                ["model", "method", "way", "requests/s", "rows/s", "share of plain", "p50", "p99"],
                found.rows,
            )
        ],
        charts=[Chart(f"{bench.callers} callers", "rows a second", found.bars)],
    )


def measure(bench: Bench, found: Findings, subject: Subject, address: str) -> None:
    """Adds what the callers of the server at `address`, which serves that model, and of an engine get."""
    pixels = np.asarray(photograph())
    maps = {}
    with camserve.Client(address, timeout=None) as client:
        for load in LOADS:

            def through_grpc(load: Load = load) -> camserve.Explanation:
                return _explained(client, subject, load, pixels)

            maps["grpc"] = through_grpc().saliency
            with ours.engine() as running:
                job = _submitted(running, subject, subject.x, load)
                maps["engine"] = job.result.maps[0].numpy()
            agree = f"maps to {np.abs(maps['grpc'] - maps['engine']).max():.0e}"
            _measure(bench, found, subject, load, through_grpc, agree)


def _measure(
    bench: Bench,
    found: Findings,
    subject: Subject,
    load: Load,
    through_grpc: Callable[[], camserve.Explanation],
    agree: str,
) -> None:
    latencies: dict[str, list[float]] = {"in process": [], "gRPC": []}
    requests: dict[str, list[float]] = {"in process": [], "gRPC": []}

    seconds = 4 * bench.seconds

    def note(way: str, timed: Timed, times: list[float]) -> Timed:
        latencies[way] += times
        requests[way].append(len(times) / timed.seconds)
        return timed

    def directly() -> Timed:
        config = subject.config.model_copy(update={"batch_size": lane_size(subject)})
        return note("in process", *bench.apart_as_served(in_process, config, load, bench.callers, seconds))

    def over_grpc() -> Timed:
        return note("gRPC", *callers(lambda: through_grpc().cost.rows, bench.callers, seconds))

    sides = {"in process": directly, "gRPC": over_grpc}
    with_plain = {"plain": subject.limit.side(bench.seconds), **sides}
    rates = bench.alternate(f"{bench.callers} callers of {load.method}", with_plain)
    share = rates["gRPC"].over(rates["in process"])
    because = "callers, the service's threads and the engine share the cores, and the way there and back is on top"
    found.claims.append(
        Claim(f"{load.method} over gRPC, rows a second", "in process", share, AIM, "share", agree, because)
    )
    found.bars[load.method] = {way: rates[way].rate for way in sides}
    for way in sides:
        times, rate = latencies[way], rates[way]
        each = f"{sorted(requests[way])[len(requests[way]) // 2]:.1f}"
        cells = [subject.name, load.method, way, each, f"{rate.rate:.1f}", f"{rate.over(rates['plain']):.2f}"]
        found.rows.append([*cells, *(f"{1e3 * percentile(times, share):.0f}" for share in (0.5, 0.99))])


def callers(call: Callable[[], int], count: int, seconds: float) -> tuple[Timed, list[float]]:
    """So many threads call again and again, at least once in all, until the time is over; the seconds of each."""
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
    """The same load for an engine in this process: to be called in one that has nothing else to do, as a server's."""
    subject = _subject(config.model_dump_json(), device)
    with ours.engine() as running:
        return callers(lambda: _request(running, subject, load), count, seconds)


@cache
def _subject(config: str, device: str) -> Subject:
    return from_config(ModelConfig.model_validate_json(config), torch.device(device), 0.0)


def _request(running: Engine, subject: Subject, load: Load) -> int:
    """The picture is resized and normalised as the service does it."""
    x = subject.model.preprocessing(from_pixels(np.asarray(photograph())))
    watched = _submitted(running, subject, x, load)
    watched.wait()
    return watched.rows


def _submitted(running: Engine, subject: Subject, x: Tensor, load: Load) -> Watched:
    """With the batch sizes of the server."""
    sizes = dict.fromkeys(get_args(LaneKind), lane_size(subject))
    return ours.submit(
        running, subject.model, x, subject.call(load.method), budget=load.budget, after=0, batch_sizes=sizes
    )


def lane_size(subject: Subject) -> int:
    """Of all lanes of the server that is started: a configuration has one number for all."""
    return subject.model.batch_sizes["forward"]


def _explained(
    client: camserve.Client, subject: Subject, load: Load, pixels: NDArray[np.uint8]
) -> camserve.Explanation:
    return client.explain(pixels, model=subject.name, method=load.method, budget=load.budget or None)


@contextmanager
def server(subject: Subject, device: str) -> Iterator[str]:
    """`camserve serve` with the embedded model, as a process; its address once it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "camserve.toml"
        config.write_text(
            f'listen = "127.0.0.1:0"\ndevice = "{device}"\nlog_level = "error"\n\n[[models]]\n'
            f'name = "{subject.name}"\nsource = "{subject.model.source}"\nbatch_size = {lane_size(subject)}\n'
        )
        command = [sys.executable, "-m", "camserve_cli", "serve", "--config", str(config)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
            try:
                assert process.stdout is not None
                ready = re.match(r"camserve is ready on (\S+), serving", process.stdout.readline())
                if ready is None:
                    raise RuntimeError("the server did not start")
                yield ready[1]
            finally:
                process.terminate()
