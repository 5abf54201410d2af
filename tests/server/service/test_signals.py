"""Signals while the server starts."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from camserve_server.config import Config, ModelConfig
from camserve_server.service import server
from tests.support import TIMEOUT_S

TINY = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restore the signal handlers of pytest."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("iterations", range(5))
def test_signal_at_the_end_of_the_start_is_not_lost(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start ends some iterations of the event loop after the signal, at one of them before its handler runs."""

    class SignalledServer(server.Server):
        async def start(self) -> None:
            await super().start()
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(iterations):
                await asyncio.sleep(0)

    monkeypatch.setattr(server, "Server", SignalledServer)
    config = Config(listen="127.0.0.1:0", models=[TINY], device="cpu", threads=1, cache_dir="", grace_s=0)

    async def run() -> int:
        async with asyncio.timeout(TIMEOUT_S):
            return await server.run(config, lambda _: None)

    assert asyncio.run(run()) == 0
