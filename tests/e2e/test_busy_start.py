"""Servers that start while other processes use the machine, and that have it for themselves afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import numpy as np
import pytest
from structlog.testing import capture_logs
from torch import Tensor, nn

import camserve
from camserve_server import batch_sizes
from camserve_server.config import Config, ModelConfig
from camserve_server.engine import warmup
from camserve_server.engine.engine import Engine
from camserve_server.engines import Engines
from camserve_server.model_pool import ModelPool
from camserve_server.models import throughput
from camserve_server.service.server import Server
from tests import nets
from tests.conftest import serving
from tests.processes import LIMIT_S, patient_client

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
WINDOW_S = 3.0


class Slow(nn.Module):
    """Network whose forward pass takes `seconds` longer."""

    seconds = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.net(x)  # type: ignore[no-any-return]


@pytest.fixture
def slow_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a server whose network was slow while it was loaded: 20 batches per second."""
    monkeypatch.setattr(Slow, "seconds", 0.05)
    model = ModelConfig(name="slow", source=f"python:{__name__}:Slow", input_size=(32, 32), batch_size=4)
    with serving(Config(listen="127.0.0.1:0", models=[model])) as server:
        monkeypatch.setattr(Slow, "seconds", 0.0)
        yield server


def ask(client: camserve.Client) -> None:
    """Send a request for a thousand rows, which take 13 s at the speed of the start, with a timeout of 10 s."""
    client.explain(IMAGE, method="occlusion", parameters={"stride": 1, "window": 1}, timeout=10)


@pytest.mark.slow
def test_short_requests_correct_the_throughput_that_the_start_measured(slow_start: Server) -> None:
    with patient_client(slow_start.address) as client:
        with pytest.raises(camserve.DeadlineExceeded) as caught:
            ask(client)
        assert caught.value.reason == "DEADLINE_UNREACHABLE"
        assert caught.value.retry_after_s is not None
        assert slow_start.models["slow"].throughput["forward"].best() < 100
        client.explain(IMAGE, method="rise", parameters={"masks": 40})
        assert slow_start.models["slow"].throughput["forward"].best() > 100
        ask(client)


@pytest.mark.slow
def test_refusals_end_without_any_observation(slow_start: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """If every request were refused, no batch would correct the throughput."""
    monkeypatch.setattr(throughput, "WINDOW_S", WINDOW_S)
    with patient_client(slow_start.address) as client:
        end = time.monotonic() + LIMIT_S
        while slow_start.models["slow"].throughput["forward"].best():
            assert time.monotonic() < end
            time.sleep(0.05)
        ask(client)


@pytest.mark.slow
def test_batch_sizes_are_measured_again_for_the_next_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sizes, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(warmup, "MEASURE_S", 0)
    busy = iter([True, True])  # at the load, and at the first of two measurements
    monkeypatch.setattr(Engine, "machine_was_busy", lambda self, since: next(busy, False))
    monkeypatch.setitem(warmup.SIZES, "cpu", (2,))
    config = Config(models=[ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32))])

    async def life() -> None:
        engines = Engines(config)
        engines.start()
        try:
            models = ModelPool(config, engines)
            await models.load_all()
            monkeypatch.setitem(warmup.SIZES, "cpu", (4,))
            async with models.lease("tiny") as lease, asyncio.timeout(LIMIT_S):
                while not any(line["event"] == "measured again on an idle machine" for line in log):
                    await asyncio.sleep(0.01)
                assert set(lease.model.batch_sizes.values()) == {2}, "a loaded model keeps its sizes"
            monkeypatch.setitem(warmup.SIZES, "cpu", (8,))
            assert set((await models.reload("tiny")).batch_sizes.values()) == {4}
        finally:
            engines.close()

    with capture_logs() as log:
        asyncio.run(life())
