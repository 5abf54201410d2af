"""Memory of the server's process for requests that wait for their first batch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from torch import Tensor, nn

from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from tests import nets
from tests.processes import LIMIT_S, Served, served

SIDE_PX = 224
REQUESTS = 150
GATE = "TEST_MEMORY_GATE"
INPUT_BYTES, MAP_BYTES = 3 * SIDE_PX**2 * 4, SIDE_PX**2 * 4
CONFIG = f"""
listen = "127.0.0.1:0"
device = "cpu"
max_rows_owed = 1000000
[[models]]
name = "gated"
source = "python:{__name__}:Gated"
input_size = [{SIDE_PX}, {SIDE_PX}]
batch_size = 1
"""


class Gated(nn.Module):
    """Network whose forward pass waits while the gate's file exists."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        while Path(os.environ[GATE]).exists():
            time.sleep(0.01)
        return self.net(x)  # type: ignore[no-any-return]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def server(tmp_path: Path, gate: Path) -> Iterator[Served]:
    config = tmp_path / "camserve.toml"
    config.write_text(CONFIG)
    with served(config, **{GATE: str(gate)}) as running:
        yield running


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wait_until_idle(pid: int) -> None:
    """Wait until the process has used nearly no CPU time for a second, so that all requests have been decoded."""
    clock, end = ~pid << 3 | 2, time.monotonic() + LIMIT_S
    before = -1.0
    while (now := time.clock_gettime(clock)) - before > 0.05:
        assert time.monotonic() < end
        before = now
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_waiting_request_takes_the_input_and_two_maps(server: Served, gate: Path) -> None:
    """docs/operations.md states it. The requests need more than one input, so a second copy would be noticed."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    image = pb.Image(pixels=pb.Pixels(height=SIDE_PX, width=SIDE_PX, data=pixels.tobytes()))
    request = pb.ExplainRequest(image=image, method=pb.MethodSpec(name="score-cam"))
    with grpc.insecure_channel(server.address) as channel:
        explain = ExplainServiceStub(channel).Explain
        for _ in range(3):
            explain(request, timeout=LIMIT_S)
        wait_until_idle(server.process.pid)
        before = resident_bytes(server.process.pid)
        gate.touch()
        calls = [explain.future(request, timeout=LIMIT_S) for _ in range(REQUESTS)]
        wait_until_idle(server.process.pid)
        each = (resident_bytes(server.process.pid) - before) / REQUESTS
        assert not any(call.done() for call in calls)
        for call in calls:
            call.cancel()
        gate.unlink()
    assert INPUT_BYTES <= each <= INPUT_BYTES + 2 * MAP_BYTES
