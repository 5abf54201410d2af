"""Pings of clients on connections whose calls take long and transfer no data."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from camserve_server.service.listeners import KEEPALIVE

CALL_S = 8
PING_MS = 1000
INTERVAL = "grpc.http2.min_ping_interval_without_data_ms"


@pytest.mark.slow
def test_call_survives_more_pings_than_grpc_allows_by_default() -> None:
    """By default, gRPC closes a connection at the fifth ping within five minutes.

    The test shortens the intervals of client and server.
    """
    server_options = [(name, value // 100 if name == INTERVAL else value) for name, value in KEEPALIVE]
    client_options = [("grpc.keepalive_time_ms", PING_MS), ("grpc.http2.max_pings_without_data", 0)]

    async def slow(request: bytes, context: object) -> bytes:
        await asyncio.sleep(CALL_S)
        return request

    async def run() -> bytes:
        server = grpc.aio.server(options=server_options)
        handler: Any = grpc.unary_unary_rpc_method_handler(slow)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Slow", {"Call": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=client_options) as channel:
                call: Any = channel.unary_unary("/test.Slow/Call")
                response: bytes = await call(b"done", timeout=120)
                return response
        finally:
            await server.stop(None)

    assert asyncio.run(run()) == b"done"
