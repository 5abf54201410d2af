"""The web application: its pages, its interface for the page's scripts, and who may use it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from camserve import aio
from camserve.addresses import is_loopback_host
from camserve.errors import CamserveError, InvalidArgument, TooLarge
from camserve.images import MAX_MESSAGE_BYTES
from camserve.receipt import Receipt
from camserve.version import __version__
from camserve_ui import answers, image_files, problems, streams
from camserve_ui.colour_maps import COLOUR_MAPS
from camserve_ui.requests import ExplainForm, read_map, split_body

__all__ = ["create_app"]

_FOLDER = Path(__file__).parent
# A DICOM file with many frames is larger than a request to the camserve server, which contains one frame.
_MAX_FILE_BYTES = 8 * MAX_MESSAGE_BYTES
# An image for the camserve server, and perhaps a map. The client reports an image that is too large.
_MAX_BODY_BYTES = 2 * MAX_MESSAGE_BYTES
# Seconds for the lists of models and methods.
_LIST_TIMEOUT_S = 10.0
_EXAMPLES = {
    "cat": "Cat; photograph by Stéfan van der Walt, CC0",
    "coffee": "Coffee; photograph by Rachel Michetti, CC0",
    "cameraman": "Cameraman; photograph by Lav Varshney, CC0",
}
# The browser must load nothing from other hosts, and no other page may embed or read this one.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def create_app(client: aio.Client, *, check_host: bool = True) -> Starlette:
    """Return the web application.

    Args:
        client: Client of the camserve server. The application closes it at its end.
        check_host: True to refuse requests whose Host is not this machine. They come from a page of another host whose
            name resolves to this machine (DNS rebinding).
    """
    handlers = _Handlers(client)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    return Starlette(
        routes=[
            Route("/", handlers.page),
            Route("/api/settings", handlers.settings),
            Route("/api/models", handlers.models),
            Route("/api/methods", handlers.methods),
            Route("/api/image", handlers.image, methods=["POST"]),
            Route("/api/explain", handlers.explain, methods=["POST"]),
            Route("/api/evaluate", handlers.evaluate, methods=["POST"]),
            Route("/api/replay", handlers.replay, methods=["POST"]),
            Mount("/page", StaticFiles(directory=_FOLDER / "page")),
            Mount("/examples", StaticFiles(directory=_FOLDER / "examples")),
        ],
        middleware=[Middleware(_Guard, check_host=check_host)],
        lifespan=lifespan,
    )


def _reports_errors(
    handler: Callable[[_Handlers, Request], Awaitable[Response]],
) -> Callable[[_Handlers, Request], Awaitable[Response]]:
    """Let a handler respond with a problem if it raises an error."""

    async def reporting(self: _Handlers, request: Request) -> Response:
        try:
            return await handler(self, request)
        except CamserveError as error:
            return JSONResponse({"problem": problems.describe(error)}, 400)
        except Exception as error:
            streams.log_failure(error)
            return JSONResponse({"problem": problems.internal(error)}, 500)

    return reporting


class _Handlers:
    """The handlers of all paths."""

    def __init__(self, client: aio.Client) -> None:
        self._client = client

    async def page(self, _: Request) -> Response:
        return FileResponse(_FOLDER / "page" / "index.html")

    async def settings(self, _: Request) -> Response:
        """Respond with what does not depend on the camserve server."""
        return JSONResponse(
            {
                "address": self._client.address,
                "version": __version__,
                "dicom": image_files.dicom_is_installed(),
                "colours": {name: colours.tolist() for name, colours in COLOUR_MAPS.items()},
                "examples": [{"name": name, "title": title} for name, title in _EXAMPLES.items()],
            }
        )

    @_reports_errors
    async def models(self, _: Request) -> Response:
        models = await self._client.models(timeout=_LIST_TIMEOUT_S)
        return JSONResponse([answers.model(each) for each in models])

    @_reports_errors
    async def methods(self, request: Request) -> Response:
        methods = await self._client.methods(request.query_params.get("model"), timeout=_LIST_TIMEOUT_S)
        return JSONResponse([answers.method(each) for each in methods])

    @_reports_errors
    async def image(self, request: Request) -> Response:
        """Respond with the preview of a file. The body is an object with options, and the file."""
        options, content = split_body(await _body(request, _MAX_FILE_BYTES))
        return JSONResponse(asdict(await asyncio.to_thread(image_files.load, content, options)))

    @_reports_errors
    async def explain(self, request: Request) -> Response:
        fields, image = split_body(await _body(request))
        return _Events(streams.explain(self._client, image, ExplainForm.read(fields)))

    @_reports_errors
    async def evaluate(self, request: Request) -> Response:
        """Score a map. The body is an object, the map, and the image."""
        fields, content = split_body(await _body(request))
        saliency, image = read_map(fields, content)
        model, target = str(fields.get("model")), fields.get("target")
        if not isinstance(target, int):
            raise InvalidArgument("the request names no class", field="target")
        return _Events(streams.evaluate(self._client, image, saliency, model, target))

    @_reports_errors
    async def replay(self, request: Request) -> Response:
        fields, image = split_body(await _body(request))
        return _Events(streams.replay(self._client, image, Receipt.from_json(str(fields.get("receipt")))))


class _Events(StreamingResponse):
    """A response with one JSON object per line. When the browser disconnects, it closes the generator of the events."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        self._content = self._lines(events)
        super().__init__(self._content, media_type="application/x-ndjson")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._content):  # Starlette leaves that to Python's garbage collection.
            await super().__call__(scope, receive, send)

    @staticmethod
    async def _lines(events: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
        async with aclosing(events):
            async for event in events:
                yield json.dumps(event) + "\n"


async def _body(request: Request, limit: int = _MAX_BODY_BYTES) -> bytes:
    """Return the body of a request, in memory only. Raises TooLarge if it has more bytes than the limit."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLarge(f"the file is larger than {limit // 2**20} MiB; use a smaller file", field="image")
        parts.append(part)
    return b"".join(parts)


class _Guard:
    """Middleware that refuses requests of other web pages, and adds the security headers to all responses."""

    def __init__(self, app: ASGIApp, check_host: bool) -> None:
        self._app = app
        self._check_host = check_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif refusal := self._refusal(Request(scope)):
            await Response(refusal, 403)(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> str:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._check_host and not is_loopback_host(host):
            return "The host of the request is not this machine.\n"
        if origin is not None and origin.partition("://")[2] != host:
            return "The request comes from a page of another origin.\n"
        return ""
