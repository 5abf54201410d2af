"""ASGI middleware that limits the size of requests and cancels a request when its caller disconnects."""

from __future__ import annotations

import asyncio

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from camserve.errors import TooLarge
from camserve_kserve import responses

__all__ = ["RequestGuard"]


class RequestGuard:
    """ASGI application that passes complete requests on to another one.

    Args:
        app: The other application. All its endpoints need the whole body.
        max_body_bytes: Maximum size of the body of a request.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        announced = int(dict(scope["headers"]).get(b"content-length", b"0"))
        more = announced <= self._max_body_bytes
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False) and len(body) <= self._max_body_bytes
        size = max(announced, len(body))
        if size > self._max_body_bytes:
            error = TooLarge(
                f"the request has more than {self._max_body_bytes / 2**20:g} MiB; send a compressed file, or increase "
                "--max-body-mib of the explainer",
                reason="TOO_LARGE",
            )
            content, _ = responses.error_content(error)
            await JSONResponse(content, responses.http_status(error))(scope, receive, send)
            return
        await self._run(scope, body, receive, send)

    async def _run(self, scope: Scope, body: bytearray, receive: Receive, send: Send) -> None:
        left = asyncio.ensure_future(receive())  # It waits until the caller disconnects.
        pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await asyncio.shield(left)

        answered = asyncio.ensure_future(self._app(scope, replay, send))
        try:
            await asyncio.wait({left, answered}, return_when=asyncio.FIRST_COMPLETED)
        finally:  # This task itself may be cancelled.
            finished = answered.done()
            answered.cancel()
            left.cancel()
        if finished:
            await answered
