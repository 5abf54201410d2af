"""The events of a request on the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from camserve.v1 import explain_pb2 as pb
from camserve_server.engine.job import Progress
from camserve_server.service.event_stream import EventStream
from camserve_server.service.map_format import MapFormat
from tests import nets
from tests.support import TIMEOUT_S, as_model


async def call(function: Any, *args: Any) -> Any:
    return function(*args)


@pytest.mark.parametrize("heartbeats_only", [False, True])
@pytest.mark.parametrize("ticks", range(6))
def test_cancellation_that_comes_with_an_event_ends_the_stream(ticks: int, heartbeats_only: bool) -> None:
    """`ticks` is the number of steps of the event loop between the event and the cancellation."""

    async def read(events: EventStream) -> list[Any]:
        return [message async for message in events.messages(call)]

    async def scenario() -> None:
        events = EventStream(as_model(nets.tiny_cnn()), MapFormat(), {pb.Progress}, heartbeats_only=heartbeats_only)
        reader = asyncio.create_task(read(events))
        await asyncio.sleep(0)
        events.notify(Progress(1, 10))
        for _ in range(ticks):
            await asyncio.sleep(0)
        reader.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.wait([reader])
        assert reader.cancelled()

    asyncio.run(scenario())
