"""Responses that are streams of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from camserve_ui.app import _Events


@pytest.mark.parametrize("disconnects", [False, True])
def test_events_end_with_a_response_that_is_left_while_it_is_sent(disconnects: bool) -> None:
    ended = False

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        nonlocal ended
        try:
            while True:
                yield {"event": "progress"}
        finally:
            ended = True

    async def scenario() -> None:
        response, sending, left = _Events(events()), asyncio.Event(), asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sending.set()
                await asyncio.get_running_loop().create_future()

        async def receive() -> Any:
            await left.wait()
            return {"type": "http.disconnect"}

        responding = asyncio.ensure_future(response({"type": "http", "asgi": {}}, receive, send))
        await sending.wait()
        if disconnects:
            left.set()
        else:
            responding.cancel()
        await asyncio.wait([responding])
        assert ended

    asyncio.run(scenario())
