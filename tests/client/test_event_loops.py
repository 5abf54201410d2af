"""`camserve.aio.Client` outside of an event loop, in several event loops, and in threads."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

import camserve
from tests.client.fake_server import WAIT_S, Servicer


async def explain(client: camserve.aio.Client, image: NDArray[np.uint8]) -> int:
    """Return the rows of a unary call, a stream and one of many calls."""
    rows = (await client.explain(image, timeout=20)).cost.rows
    rows += (await client.explain(image, timeout=WAIT_S)).cost.rows
    async for event in client.explain_stream(image):
        rows += event.cost.rows if isinstance(event, camserve.Explanation) else 0
    async for result in client.explain_many([image]):
        rows += result.cost.rows
    return rows


def test_client_is_used_in_several_event_loops_one_after_another(address: str, pixels: NDArray[np.uint8]) -> None:
    client = camserve.aio.Client(address, timeout=WAIT_S)
    for _ in range(3):
        assert asyncio.run(explain(client, pixels)) == 48
        gc.collect()
    assert len(client._opened) == 1, "channels of closed event loops are kept"
    asyncio.run(client.close())
    with pytest.raises(camserve.CamserveError, match="the client is closed"):
        asyncio.run(client.models())


def test_client_is_used_in_event_loops_of_threads(address: str, pixels: NDArray[np.uint8]) -> None:
    client = camserve.aio.Client(address, timeout=WAIT_S)
    with ThreadPoolExecutor(3) as threads:
        rows = [*threads.map(lambda _: asyncio.run(explain(client, pixels)), range(6))]
    assert rows == [48] * 6


def test_call_without_an_event_loop_names_the_remedy(address: str, servicer: Servicer) -> None:
    client = camserve.aio.Client(address)
    for call in (client.models(), client.explain(b""), anext(client.explain_stream(b""))):
        with pytest.raises(
            camserve.CamserveError, match=r"no event loop of asyncio is running; .* or use camserve\.Client"
        ):
            call.__await__().send(None)  # as the event loop of another library does
    assert not servicer.requests


def test_closing_in_another_event_loop_ends_calls(address: str, servicer: Servicer, pixels: NDArray[np.uint8]) -> None:
    client = camserve.aio.Client(address, timeout=WAIT_S)

    def call() -> None:
        with pytest.raises(camserve.Cancelled):
            asyncio.run(client.explain(pixels, model="slow"))

    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(call)
        assert servicer.started.wait(WAIT_S)
        asyncio.run(client.close())
        ended.result(WAIT_S)
    assert servicer.cancelled.wait(WAIT_S)
