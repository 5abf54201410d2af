"""Events of one request, passed from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from typing import Any, TypeAlias

from camserve.v1 import explain_pb2 as pb
from camserve_server.engine.job import Event, Progress
from camserve_server.models.model import Model
from camserve_server.plan import Level, MapWarning, Randomised, Stage
from camserve_server.service import responses
from camserve_server.service.map_format import MapFormat

PROGRESS_EVERY_S = 0.1
HEARTBEAT_S = 15.0

StreamMessage: TypeAlias = pb.Progress | pb.Level | pb.Randomised


class EventStream:
    """Converts the events of a request to messages; drops the kinds that the call does not return.

    Create it on the event loop.

    Args:
        model: The model of the request.
        map_format: The format of the maps.
        kinds: The kinds of messages that the call returns; empty for a unary call. Maps of other kinds are not encoded.
        warnings: The warnings about the image.
        heartbeats_only: Send progress only to keep the connection open.

    Attributes:
        warnings: The warnings about the image and of the engine; complete at the end of `messages`.
        randomised: The plan has made maps of networks with random weights, whether the call returns them or not.
    """

    def __init__(
        self,
        model: Model,
        map_format: MapFormat,
        kinds: Collection[type[StreamMessage]],
        warnings: Iterable[str] = (),
        *,
        heartbeats_only: bool = False,
    ) -> None:
        self.warnings = [*warnings]
        self.randomised = False
        self._model = model
        self._map_format = map_format
        self._kinds = kinds
        self._heartbeats_only = heartbeats_only
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Progress | Stage | Level | Randomised | None] = asyncio.Queue()

    def notify(self, event: Event) -> None:
        """Add an event. The engine's thread calls it."""
        self.randomised |= isinstance(event, Randomised)
        match event:
            case MapWarning(text):
                self.warnings.append(text)
            case Level() if pb.Level in self._kinds:
                self._put(event)
            case Randomised() if pb.Randomised in self._kinds:
                self._put(event)
            case Progress() | Stage() if pb.Progress in self._kinds:
                self._put(event)

    def end(self) -> None:
        """Add the end of the stream; any thread may call it."""
        self._put(None)

    def _put(self, item: Progress | Stage | Level | Randomised | None) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def messages(self, encode: Callable[..., Awaitable[Any]]) -> AsyncIterator[StreamMessage]:
        """Yield the messages until the end of the stream.

        Args:
            encode: Calls a function with arguments in a codec thread.

        Yields:
            Every map, and the progress: at most every 0.1 s, at least every 15 s, and when all rows are done. A call
            that does not return progress gets none. A call with heartbeats only gets progress every 15 s.
        """
        progress = pb.Progress()
        sent, quiet_since = 0.0, time.monotonic()
        while True:
            heartbeat_s = max(0.0, quiet_since + HEARTBEAT_S - time.monotonic()) if pb.Progress in self._kinds else None
            try:
                async with asyncio.timeout(heartbeat_s):
                    item = await self._queue.get()
            except TimeoutError:
                quiet_since = time.monotonic()
                yield progress
                continue
            match item:
                case None:
                    return
                case Stage(name):
                    progress = pb.Progress(rows_done=progress.rows_done, rows_total=progress.rows_total, stage=name)
                case Progress(done, total):
                    progress = pb.Progress(rows_done=done, rows_total=total, stage=progress.stage)
                    now = time.monotonic()
                    if not self._heartbeats_only and (now - sent >= PROGRESS_EVERY_S or done == total):
                        sent = quiet_since = now
                        yield progress
                case Level():
                    yield await encode(responses.level, item, self._model, self._map_format)
                case Randomised():
                    yield await encode(responses.randomised, item, self._map_format)
