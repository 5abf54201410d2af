"""Work of the server's host for each request: a network that computes almost nothing, against a bare gRPC echo."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from benchmarks.bench_setup import Bench
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.timing import Side, Timed
from camserve.v1 import explain_pb2 as pb
from camserve_server.config import Config, ModelConfig
from camserve_server.service.logs import log_to_stderr

AIM = 4.0  # at most this multiple of the CPU time of the echo
SIDE_PX = 224
METHODS = ("cam", "grad-cam")
ECHO, EXPLAIN = "/echo.Echo/Echo", "/camserve.v1.ExplainService/Explain"
NULL = ModelConfig(name="null", source="python:tests.nets:null_net")

TEXT = (
    "{callers} callers send an image of 150 KB as pixels and receive a map of 200 KB, over gRPC on loopback. The "
    "network is one pooling, one 1 × 1 convolution and one linear layer, so nearly all of the time is the host's. "
    "*Echo*: a bare `grpc.aio` server that receives and returns messages of the same sizes. CPU time of the server's "
    "process in milliseconds per request, by the thread that used it; *other* contains the threads of gRPC."
)


@dataclass(frozen=True)
class Measured:
    """Requests of one measurement, their duration, and the CPU seconds of the server by thread."""

    requests: int
    seconds: float
    cpu_s: Mapping[str, float]

    @property
    def cpu_ms(self) -> float:
        """CPU time per request in milliseconds."""
        return 1e3 * self.cpu_s["process"] / self.requests

    def thread_ms(self, name: str) -> float:
        """CPU time per request of the threads whose name starts with `name`, in milliseconds."""
        return 1e3 * sum(s for each, s in self.cpu_s.items() if each.startswith(name)) / self.requests


# ---- servers, each in a process of its own ---------------------------------------------------------------------------


def _cpu_s() -> dict[str, float]:
    """Return the CPU seconds of this process and of each of its Python threads."""
    used = {"process": time.process_time()}
    for thread in threading.enumerate():
        assert thread.ident is not None, "a running thread has an identifier"
        used[thread.name] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return used


def _answer_questions(connection: Connection) -> None:
    """Send the CPU times whenever the other process asks, until it closes the connection."""
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(_cpu_s())


def _serve_camserve(connection: Connection) -> None:
    from camserve_server.torch_setup.allocator import keep_memory
    from tests.conftest import serving

    config = Config(listen="127.0.0.1:0", device="cpu", log_level="info", models=[NULL])
    sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # used until the process ends
    log_to_stderr(config)
    keep_memory()
    torch.set_num_threads(2)
    with serving(config) as server:
        connection.send(server.address)
        _answer_questions(connection)


def _serve_echo(connection: Connection) -> None:
    reply = bytes(4 * SIDE_PX * SIDE_PX)

    async def echo(request: bytes, context: object) -> bytes:
        return reply

    async def life() -> None:
        server = grpc.aio.server()
        handler: Any = grpc.unary_unary_rpc_method_handler(echo)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Echo": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        connection.send(f"127.0.0.1:{port}")
        await asyncio.to_thread(_answer_questions, connection)
        await server.stop(0)

    asyncio.run(life())


class ServerProcess:
    """Server in a process of its own that reports the CPU time of its threads."""

    def __init__(self, serve: Any) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.address: str = self._connection.recv()

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds of the process and of its Python threads."""
        self._connection.send(None)
        used: dict[str, float] = self._connection.recv()
        return used

    def close(self) -> None:
        """Stop the server and end the process."""
        self._connection.close()
        self._process.join()


# ---- callers ---------------------------------------------------------------------------------------------------------


def request(method: str) -> bytes:
    """Return an Explain request for an image of 224 × 224 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    image = pb.Image(pixels=pb.Pixels(height=SIDE_PX, width=SIDE_PX, data=pixels.tobytes()))
    return pb.ExplainRequest(image=image, method=pb.MethodSpec(name=method)).SerializeToString()


async def _call_for(address: str, path: str, message: bytes, callers: int, seconds: float) -> tuple[int, float]:
    """Send the message from several callers, each after its previous response. Return requests and seconds."""
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(path)  # messages stay bytes, which saves the callers' CPU time
        done = 0
        end = time.perf_counter() + seconds

        async def caller() -> None:
            nonlocal done
            while time.perf_counter() < end:
                await call(message)
                done += 1

        start = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        return done, time.perf_counter() - start


def measure(server: ServerProcess, path: str, message: bytes, callers: int, seconds: float) -> Measured:
    """Call a server for some seconds, after a warm-up."""
    asyncio.run(_call_for(server.address, path, message, callers, seconds / 4))
    before = server.cpu_s()
    requests, took = asyncio.run(_call_for(server.address, path, message, callers, seconds))
    after = server.cpu_s()
    return Measured(requests, took, {name: used - before.get(name, 0.0) for name, used in after.items()})


# ---- the section -----------------------------------------------------------------------------------------------------


@contextmanager
def servers() -> Iterator[dict[str, ServerProcess]]:
    """Run both servers."""
    running = {"echo": ServerProcess(_serve_echo), "camserve": ServerProcess(_serve_camserve)}
    try:
        yield running
    finally:
        for each in running.values():
            each.close()


def section(bench: Bench) -> Result:
    """Measure the CPU time per request of each method, and of the echo."""
    findings = Findings()
    with servers() as running:
        for method in METHODS:
            _measure(bench, findings, running, method)
    return Result(
        "Host",
        TEXT.format(callers=bench.callers),
        claims=findings.claims,
        tables=[
            Table(
                "Median of the rounds:",
                ["method", "requests/s", "CPU ms", "÷ echo", "engine", "codec", "event loop", "other"],
                findings.rows,
            )
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
    share = rates["camserve"].over(rates["echo"])
    for name in ("echo", "camserve") if method == METHODS[0] else ("camserve",):
        each = sorted(measured[name], key=lambda one: one.cpu_ms)[len(measured[name]) // 2]
        threads = [each.thread_ms(part) for part in ("engine", "codec", "server")]
        other = each.cpu_ms - sum(threads)
        times = f"{1 / rates['camserve'].over(rates['echo']):.1f}" if name == "camserve" else "1"
        label = method if name == "camserve" else "echo"
        cells = [f"{value:.2f}" for value in (*threads, other)] if name == "camserve" else ["–"] * 4
        findings.rows.append([label, f"{each.requests / each.seconds:.0f}", f"{each.cpu_ms:.2f}", times, *cells])
    findings.bars[method] = {name: 1e3 / rate.rate for name, rate in rates.items()}
    findings.claims.append(
        Claim(
            f"Echo's CPU time per request, as a share of camserve's, {method}",
            "bare grpc.aio echo",
            share,
            1 / AIM,
            "share",
            because="see the table: the work of each thread",
        )
    )
