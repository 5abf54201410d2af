"""Memory of the server's process for requests that wait for their first batch."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from tests.gated import GATE
from tests.http2 import wait_until
from tests.processes import LIMIT_S, Served, children, free_port, served

SIDE_PX = 224
REQUESTS = 150
INPUT_BYTES, MAP_BYTES = 3 * SIDE_PX**2 * 4, SIDE_PX**2 * 4
CONFIG = f"""
listen = "127.0.0.1:0"
device = "cpu"
metrics_listen = "{{metrics}}"
frontends = {{frontends}}
max_rows_owed = 1000000
[[models]]
name = "gated"
source = "python:tests.gated:Gated"
input_size = [{SIDE_PX}, {SIDE_PX}]
batch_size = 1
"""


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def metrics() -> str:
    """The address of the server's metrics."""
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def server(tmp_path: Path, gate: Path, metrics: str, frontends: int) -> Iterator[Served]:
    config = tmp_path / "camserve.toml"
    config.write_text(CONFIG.format(frontends=frontends, metrics=metrics))
    with served(config, **{GATE: str(gate)}) as running:
        yield running


def processes(pid: int) -> list[int]:
    """Return a process and its children."""
    return [pid, *children(pid)]


def memory_bytes(pid: int) -> int:
    """Return the memory of a process and its children. Memory that they share counts once.

    Mapped files do not count: each process shares those of the libraries with all other processes of the machine, so
    that its part changes when one of them starts or ends.
    """
    rollups = [Path(f"/proc/{each}/smaps_rollup").read_text() for each in processes(pid)]
    return sum(
        1024 * int(line.split()[1])
        for text in rollups
        for line in text.splitlines()
        if line.startswith(("Pss_Anon:", "Pss_Shmem:"))
    )


def waiting_requests(metrics: str) -> float:
    """Return the number of requests that wait for their first batch."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=LIMIT_S) as page:
        (found,) = re.findall(r"^camserve_queue_requests (\S+)$", page.read().decode(), re.MULTILINE)
    return float(found)


def wait_until_idle(pid: int) -> None:
    """Wait until the processes have used nearly no CPU time for a second."""
    end, before = time.monotonic() + LIMIT_S, -1.0
    while (now := sum(time.clock_gettime(~each << 3 | 2) for each in processes(pid))) - before > 0.05:
        assert time.monotonic() < end
        before = now
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize(("frontends", "maps"), [(1, 2), (2, 3)])
def test_a_waiting_request_takes_the_input_and_some_maps(server: Served, gate: Path, metrics: str, maps: int) -> None:
    """docs/operations.md states it. A second copy of the input would exceed the limit."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    image = pb.Image(pixels=pb.Pixels(height=SIDE_PX, width=SIDE_PX, data=pixels.tobytes()))
    request = pb.ExplainRequest(image=image, method=pb.MethodSpec(name="score-cam"))
    with grpc.insecure_channel(server.address) as channel:
        explain = ExplainServiceStub(channel).Explain
        for _ in range(3):
            explain(request, timeout=LIMIT_S)
        wait_until_idle(server.process.pid)
        before = memory_bytes(server.process.pid)
        gate.touch()
        calls = [explain.future(request, timeout=LIMIT_S) for _ in range(REQUESTS)]
        wait_until(lambda: waiting_requests(metrics) == REQUESTS - 1)  # one is in the batch that the gate holds
        wait_until_idle(server.process.pid)
        each = (memory_bytes(server.process.pid) - before) / REQUESTS
        assert not any(call.done() for call in calls)
        for call in calls:
            call.cancel()
        gate.unlink()
    assert INPUT_BYTES <= each <= INPUT_BYTES + maps * MAP_BYTES
