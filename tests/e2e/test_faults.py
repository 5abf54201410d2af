"""What happens to a server, as a process of its own, when a network does what no network should."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import Tensor, nn

import camserve
from tests import nets

CONFIG = """
listen = "127.0.0.1:0"
device = "cpu"

[[models]]
name = "tricky"
source = "python:tests.e2e.test_faults:tricky"
input_size = [32, 32]
batch_size = 4
"""
CALM, LETHAL, BROKEN = (np.full((3, 32, 32), value, np.float32) for value in (0.5, 1e6, -1e6))


class Tricky(nn.Module):
    """Ends its thread for one kind of input, fails for another."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        if x.amax() >= 1e6:
            raise SystemExit("as a bug of ours would: nobody catches it")
        if x.amin() <= -1e6:
            raise ZeroDivisionError("as a bug of the network would")
        return self.net(x)  # type: ignore[no-any-return]


def tricky() -> nn.Module:
    """The factory that the configuration names."""
    return Tricky()


@contextmanager
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    (tmp_path / "camserve.toml").write_text(CONFIG)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "camserve_cli", "serve", "--config", str(tmp_path / "camserve.toml")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as running:
        try:
            assert running.stdout is not None
            yield running, running.stdout.readline().split()[4].rstrip(",")
        finally:
            running.kill()


def test_a_dead_device_thread_ends_the_process(tmp_path: Path) -> None:
    """Who waits is told, nobody hangs, and a supervisor sees the status."""
    with process(tmp_path) as (running, address), camserve.Client(address, timeout=60) as client:
        waiting = client.explain_stream(CALM, method="rise", parameters={"masks": 1_000_000})
        next(waiting)
        with pytest.raises(camserve.InternalError):
            client.explain(LETHAL, method="grad-cam")
        with pytest.raises((camserve.InternalError, camserve.Unavailable)):
            list(waiting)
        assert running.wait(30) == 1
        assert running.stderr is not None
        assert "the engine died; the server ends" in running.stderr.read()


def test_a_request_that_breaks_the_network_fails_alone(tmp_path: Path) -> None:
    with process(tmp_path) as (running, address), camserve.Client(address, timeout=60) as client:
        alone = client.explain(CALM, method="rise", parameters={"masks": 3000})
        *_, together = _with_broken_ones(client)
        assert np.array_equal(together.saliency, alone.saliency)
        with grpc.insecure_channel(address) as channel:
            asked = health_pb2.HealthCheckRequest(service="camserve.v1.ExplainService")
            assert health_pb2_grpc.HealthStub(channel).Check(asked).status == health_pb2.HealthCheckResponse.SERVING
        assert running.poll() is None


def _with_broken_ones(client: camserve.Client) -> Iterator[camserve.Explanation]:
    """The same request, and others in its batches that break them."""
    refused = 0
    for event in client.explain_stream(CALM, method="rise", parameters={"masks": 3000}):
        if isinstance(event, camserve.Explanation):
            assert refused, "there was something to break"
            yield event
        elif isinstance(event, camserve.Progress) and refused < 5:
            with pytest.raises(camserve.InternalError):
                client.explain(BROKEN, method="score-cam")
            refused += 1
