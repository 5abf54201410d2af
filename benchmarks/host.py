"""Work of the server's host for each request: a network that computes almost nothing, against a bare gRPC echo."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.bench_setup import Bench
from benchmarks.machine import ROOT, commit
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.timing import Side, Timed
from camserve.v1 import explain_pb2 as pb

AIM = 4.0  # at most this multiple of the CPU time of the echo
BASELINE_AIM = 4.0  # at least this multiple of the requests per second of the baseline
SIDE_PX = 224
METHODS = ("cam", "grad-cam")
ECHO, EXPLAIN = "/echo.Echo/Echo", "/camserve.v1.ExplainService/Explain"
CONFIG = """
listen = "127.0.0.1:0"
device = "cpu"
[[models]]
name = "null"
source = "python:benchmarks.null_net:null_net"
"""
LITE0 = """
[[models]]
name = "lite0"
source = "embedded:efficientnet-lite0"
"""
FRONT_ENDS = (1, 2, 4)
# A fixed batch size, because a server that has started on a busy machine would measure it in the idle moments.
FRONT_ENDS_CONFIG = """
frontends = {count}
listen = "127.0.0.1:0"
device = "cpu"
[[models]]
name = "null"
source = "python:benchmarks.null_net:null_net"
batch_size = 16
"""
SHORT_CALLERS = 4  # of Grad-CAM, while one caller sends requests for PCAM±

TEXT = (
    "{callers} callers send an image of 150 KB as pixels and receive a map of 200 KB, over gRPC on loopback. The "
    "network is one pooling, one 1 × 1 convolution and one linear layer, so nearly all of the time is the host's. "
    "*Echo*: a bare `grpc.aio` server that receives and returns messages of the same sizes. CPU time of the server's "
    "process in milliseconds per request, by the thread that used it: the engine's thread in forward passes "
    "(*network*) and otherwise (*engine*, with backward passes), codec threads, event loop; *other* are threads of "
    "gRPC and OpenMP."
)


@dataclass(frozen=True)
class Measured:
    """Requests of one measurement, their duration, and the CPU seconds of the server by thread."""

    requests: int
    seconds: float
    cpu_s: Mapping[str, float]

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU time per request in milliseconds."""
        return 1e3 * self.cpu_s["process"] / self.requests

    def thread_ms(self, name: str) -> float:
        """CPU time per request of the threads whose name starts with `name`, in milliseconds."""
        return 1e3 * sum(s for each, s in self.cpu_s.items() if each.startswith(name)) / self.requests


# ---- servers, each in a process of its own ---------------------------------------------------------------------------


class ServerProcess:
    """Server in a process of its own that reports the CPU time of its threads.

    Args:
        what: File of the configuration, or the number of bytes that an echo returns.
        checkout: Folder of the project whose code the process runs.

    Attributes:
        address: HOST:PORT of the server.
    """

    def __init__(self, what: str, checkout: Path = ROOT) -> None:
        folders = (checkout.resolve() / "client", checkout.resolve() / "server")  # the network is always this one
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.host_server", what],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the server writes its log as usual
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
            text=True,
        )
        ready = re.search(r"ready on (\S+:\d+)", self._line())
        if ready is None:
            raise RuntimeError(f"the server of {checkout} did not start; run it by hand to see why")
        self.address = ready[1]

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds of the process and of its Python threads."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        used: dict[str, float] = json.loads(self._line())
        return used

    def close(self) -> None:
        """Stop the server and wait for the end of the process."""
        with self._process:
            assert self._process.stdin is not None, "it is a pipe"
            self._process.stdin.close()

    def _line(self) -> str:
        assert self._process.stdout is not None, "it is a pipe"
        return self._process.stdout.readline()


# ---- callers ---------------------------------------------------------------------------------------------------------


def request(method: str, model: str = "null") -> bytes:
    """Return an Explain request for an image of 224 × 224 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    image = pb.Image(pixels=pb.Pixels(height=SIDE_PX, width=SIDE_PX, data=pixels.tobytes()))
    return pb.ExplainRequest(model=model, image=image, method=pb.MethodSpec(name=method)).SerializeToString()


async def call_for(
    address: str, path: str, message: bytes, callers: int, seconds: float, connections: int
) -> tuple[int, float]:
    """Send the message from several callers, each after its previous response. Return requests and seconds."""
    async with AsyncExitStack() as stack:
        own_connection = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, own_connection))
            for _ in range(connections)
        ]
        done = 0
        end = time.perf_counter() + seconds

        async def caller(number: int) -> None:
            nonlocal done
            # Messages stay bytes, which saves the callers' CPU time.
            call: Any = channels[number % connections].unary_unary(path)
            while time.perf_counter() < end:
                await call(message)
                done += 1

        start = time.perf_counter()
        await asyncio.gather(*(caller(number) for number in range(callers)))
        return done, time.perf_counter() - start


def measure(
    server: ServerProcess, path: str, message: bytes, callers: int, seconds: float, connections: int = 1
) -> Measured:
    """Call a server for some seconds, after a warm-up."""
    asyncio.run(call_for(server.address, path, message, callers, seconds / 4, connections))
    before = server.cpu_s()
    requests, took = asyncio.run(call_for(server.address, path, message, callers, seconds, connections))
    after = server.cpu_s()
    return Measured(requests, took, {name: used - before.get(name, 0.0) for name, used in after.items()})


# ---- the section -----------------------------------------------------------------------------------------------------


@contextmanager
def servers(baseline: Path | None) -> Iterator[dict[str, ServerProcess]]:
    """Run the echo, the server and, if a checkout is given, the server of that checkout."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = Path(folder) / "camserve.toml"
        config.write_text(CONFIG + (LITE0 if baseline else ""), encoding="utf-8")
        running = {
            "echo": ServerProcess(str(4 * SIDE_PX * SIDE_PX)),
            "camserve": ServerProcess(str(config)),
            **({"baseline": ServerProcess(str(config), baseline)} if baseline else {}),
        }
        for each in running.values():
            stack.callback(each.close)
        yield running


def section(bench: Bench) -> Result:
    """Measure the CPU time per request of each method, and of the echo."""
    findings = Findings()
    with servers(bench.baseline) as running:
        for method in METHODS:
            _measure(bench, findings, running, method)
        front_ends = _measure_front_ends(bench, running["echo"])
        if bench.baseline:
            _measure_waits(bench, findings, running, commit(bench.baseline))
    return Result(
        "Host",
        TEXT.format(callers=bench.callers),
        claims=findings.claims,
        tables=[
            Table(
                "Median of the rounds:",
                ["method", "requests/s", "CPU ms", "÷ echo", "network", "engine", "codec", "event loop", "other"],
                findings.rows,
            ),
            front_ends,
        ],
        charts=[Chart("CPU time of the server per request", "milliseconds", findings.bars)],
    )


def _measure(bench: Bench, findings: Findings, running: Mapping[str, ServerProcess], method: str) -> None:
    seconds = 2 * bench.seconds
    measured: dict[str, list[Measured]] = {name: [] for name in running}

    def side(name: str) -> Timed:
        path = ECHO if name == "echo" else EXPLAIN
        measured[name].append(measure(running[name], path, request(method), bench.callers, seconds))
        return Timed(measured[name][-1].requests, measured[name][-1].cpu_s["process"])

    sides: dict[str, Side] = {name: partial(side, name) for name in running}
    rates = bench.alternate(f"{method}, {bench.callers} callers", sides)
    medians = {name: sorted(each, key=lambda one: one.cpu_ms)[len(each) // 2] for name, each in measured.items()}
    for name, each in medians.items():
        if name == "echo" and method != METHODS[0]:
            continue
        engine, *others = [each.thread_ms(part) for part in ("engine", "codec", "MainThread")]
        network = each.thread_ms("network")
        parts = [network, engine - network, *others, each.cpu_ms - engine - sum(others)]
        label = {"echo": "echo", "camserve": method}.get(name, f"{method}, {name}")
        times = f"{1 / rates[name].over(rates['echo']):.1f}"
        cells = ["–"] * 5 if name == "echo" else [f"{value:.2f}" for value in parts]
        findings.rows.append([label, f"{each.rate:.0f}", f"{each.cpu_ms:.2f}", times, *cells])
    findings.bars[method] = {name: 1e3 / rate.rate for name, rate in rates.items()}
    findings.claims.append(
        Claim(
            f"Echo's CPU time per request, as a share of camserve's, {method}",
            "bare grpc.aio echo",
            rates["camserve"].over(rates["echo"]),
            1 / AIM,
            "share",
            because="see the table: the work of each thread",
        )
    )
    if bench.baseline:
        findings.claims.append(
            Claim(
                f"Requests per second, {method}",
                f"commit {commit(bench.baseline)}",
                medians["camserve"].rate / medians["baseline"].rate,
                BASELINE_AIM,
                because="the callers use the same cores",
            )
        )


def _measure_front_ends(bench: Bench, echo: ServerProcess) -> Table:
    """Measure `METHODS[0]` with several front ends. Each caller has a connection, so that all front ends are used."""
    message, seconds = request(METHODS[0]), 2 * bench.seconds
    measured: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        running = {"echo": echo}
        for count in FRONT_ENDS:
            config = Path(folder) / f"{count}.toml"
            config.write_text(FRONT_ENDS_CONFIG.format(count=count), encoding="utf-8")
            running[str(count)] = ServerProcess(str(config))
            stack.callback(running[str(count)].close)

        def side(name: str) -> Timed:
            path = ECHO if name == "echo" else EXPLAIN
            one = measure(running[name], path, message, bench.callers, seconds, connections=bench.callers)
            measured.setdefault(name, []).append(one)
            return Timed(one.requests, one.cpu_s["process"])

        sides: dict[str, Side] = {name: partial(side, name) for name in running}
        rates = bench.alternate(f"{METHODS[0]}, {', '.join(map(str, FRONT_ENDS))} front ends", sides)
    rows = []
    for name in map(str, FRONT_ENDS):
        one = sorted(measured[name], key=lambda each: each.cpu_ms)[len(measured[name]) // 2]
        others = one.thread_ms("children")
        times = 1 / rates[name].over(rates["echo"])
        parts = [one.cpu_ms, times, one.cpu_ms - others, others]
        rows.append([name, f"{one.rate:.0f}", *(f"{value:.2f}" for value in parts)])
    return Table(
        f"Front ends, {METHODS[0]}, each caller with a connection of its own. CPU time of all processes of the server, "
        "and of these the engine's process and the others:",
        ["front ends", "requests/s", "CPU ms", "÷ echo", "engine's process", "others"],
        rows,
    )


def _measure_waits(bench: Bench, findings: Findings, running: Mapping[str, ServerProcess], baseline: str) -> None:
    """Compare the 99th percentile of Grad-CAM beside PCAM± with that of the baseline."""
    waits: dict[str, list[float]] = {"camserve": [], "baseline": []}
    for _ in range(bench.rounds):
        for name in waits:
            bench.step(f"grad-cam beside poly-cam: {name}")
            waits[name] += asyncio.run(_latencies(running[name].address, 10 * bench.seconds))
    p99 = {name: float(np.percentile(latencies, 99)) for name, latencies in waits.items()}
    findings.claims.append(
        Claim(
            f"99th percentile of Grad-CAM while PCAM± runs on EfficientNet-Lite0 ({p99['camserve']:.2f} s)",
            f"commit {baseline} ({p99['baseline']:.2f} s)",
            p99["baseline"] / p99["camserve"],
            1.0,
        )
    )


async def _latencies(address: str, seconds: float) -> list[float]:
    """Return the seconds of each Grad-CAM from several callers, while another caller sends requests for PCAM±."""
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(EXPLAIN)
        latencies: list[float] = []
        short, long = request("grad-cam", "lite0"), request("poly-cam", "lite0")
        end = time.perf_counter() + seconds

        async def caller() -> None:
            while (start := time.perf_counter()) < end:
                await call(short)
                latencies.append(time.perf_counter() - start)

        async def other() -> None:
            while True:
                await call(long)

        beside = asyncio.create_task(other())
        await asyncio.gather(*(caller() for _ in range(SHORT_CALLERS)))
        beside.cancel()
        return latencies
