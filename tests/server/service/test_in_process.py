"""Requests without listeners."""

from __future__ import annotations

import threading

import pytest

from camserve_server.config import Config, ModelConfig
from camserve_server.errors import Unavailable
from camserve_server.service.in_process import InProcessService
from tests.support import TIMEOUT_S

TINY = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)


def test_all_futures_end_when_the_service_closes() -> None:
    service, release = InProcessService(Config(models=[TINY], device="cpu", threads=1)), threading.Event()
    service.start()

    async def answered_after(seconds: float) -> None:
        await service._codec.run(release.wait, seconds)
        raise Unavailable("the engine closed")

    short, long = service.submit(answered_after(0.1)), service.submit(answered_after(TIMEOUT_S))
    try:
        service.close()
        assert long.cancelled(), "a codec thread that takes too long"
        with pytest.raises(Unavailable):
            short.result(0)
    finally:
        release.set()
