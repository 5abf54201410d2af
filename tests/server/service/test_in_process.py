"""Requests without listeners."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from camserve_server.config import Config, ModelConfig
from camserve_server.errors import Unavailable
from camserve_server.service.in_process import InProcessService
from tests.e2e.engines import wait_until
from tests.server.service.test_errors import method, request
from tests.support import TIMEOUT_S

TINY = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)


def test_cancelled_request_computes_nothing_more() -> None:
    service = InProcessService(Config(models=[TINY], device="cpu", threads=1, cache_dir=""))
    try:
        service.start()
        engine, image = service._engines.local[0], request(model="tiny", method=method("rise", masks=1_000_000))
        future = service.submit(service.explain(image))
        wait_until(lambda: engine.counters.batches > 0)
        future.cancel()
        wait_until(lambda: engine.rows_owed() == 0)
    finally:
        service.close()


def test_all_futures_end_when_the_service_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    service, release = InProcessService(Config(models=[TINY], device="cpu", threads=1)), threading.Event()
    service.start()
    wait = asyncio.wait

    async def wait_for_short(tasks: Any, timeout: float | None = None) -> Any:
        """Give up only the long request, also on a machine that takes a second for the short one."""
        while not short.done():
            await asyncio.sleep(0.01)
        return await wait(tasks, timeout=timeout)

    async def answered_after(seconds: float) -> None:
        await service._codec.run(release.wait, seconds)
        raise Unavailable("the engine closed")

    def submit_late(_: object) -> None:
        try:
            late.append(service.submit(asyncio.sleep(0)))
        except Unavailable:
            refused.append(True)

    late, refused = list[Any](), list[bool]()
    short, long = service.submit(answered_after(0.1)), service.submit(answered_after(TIMEOUT_S))
    long.add_done_callback(submit_late)
    monkeypatch.setattr(asyncio, "wait", wait_for_short)
    try:
        service.close()
        assert long.cancelled(), "a codec thread that takes too long"
        with pytest.raises(Unavailable):
            short.result(0)
        submit_late(None)
        assert (late, len(refused)) == ([], 2), "during the end of the tasks, and after it"
    finally:
        release.set()
