"""The callers' side of a front end: it decodes the pixels of requests and passes the rest on to the engine process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import structlog

from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc
from camserve_server.config import Config
from camserve_server.errors import CamserveError, InternalError, Unavailable
from camserve_server.models.pixels import Preprocessing
from camserve_server.service import bounds, status
from camserve_server.service.call import Context, announce
from camserve_server.service.codec import CodecThreads
from camserve_server.service.decoding import DataSizes, decode_image, decode_mask, decode_saliency, digest
from camserve_server.service.frontends import identity, link_pb2, link_pb2_grpc, messages
from camserve_server.service.frontends.shared_memory import SharedMemory, Slots
from camserve_server.service.map_format import set_tensor
from camserve_server.service.result_cache.key import digested

RELAYED = {"grpc-status-details-bin", "grpc-retry-pushback-ms"}

log = structlog.get_logger()
_waiting: set[asyncio.Task[None]] = set()
T = TypeVar("T")
LinkCall: TypeAlias = "grpc.aio.StreamStreamCall[link_pb2.RunRequest, link_pb2.RunResponse]"


class FrontEndServicer(explain_pb2_grpc.ExplainServiceServicer):
    """Implements ExplainService by means of the engine process.

    Args:
        config: The configuration of the server.
        identifier: The identifier of this front end.
        channel: The channel to the engine process.
        memory: The memory that this front end shares with the engine process.

    Attributes:
        codec: Decodes images and finishes maps.
    """

    def __init__(self, config: Config, identifier: int, channel: grpc.aio.Channel, memory: SharedMemory) -> None:
        self._config = config
        self._identifier = identifier
        self._link: Any = link_pb2_grpc.LinkServiceStub(channel)
        self._lists: Any = explain_pb2_grpc.ExplainServiceStub(channel)
        self._memory = memory
        self._slots = Slots(memory)
        self._calls = itertools.count(1)
        self.codec = CodecThreads()

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """Return the maps of an image, and their scores if the request names metrics."""
        return await self.explain("Explain", request, context)

    async def explain(self, rpc: str, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """Return the response to Explain, under the name of an RPC."""
        async for message in self._run(rpc, request, context):
            response = message
        return response.explained

    async def ExplainStream(
        self, request: pb.ExplainStreamRequest, context: Context
    ) -> AsyncIterator[pb.ExplainStreamResponse]:
        """Yield progress, intermediate maps and the response of Explain."""
        async for message in self._run("ExplainStream", request.request, context, request.heartbeats_only):
            match message.WhichOneof("step"):
                case "progress":
                    yield pb.ExplainStreamResponse(progress=message.progress)
                case "level":
                    yield pb.ExplainStreamResponse(level=message.level)
                case "randomised":
                    yield pb.ExplainStreamResponse(randomised=message.randomised)
                case _:
                    yield pb.ExplainStreamResponse(result=message.explained)

    async def Evaluate(self, request: pb.EvaluateRequest, context: Context) -> pb.EvaluateResponse:
        """Return the scores of one map."""
        async for message in self._run("Evaluate", request, context):
            response = message
        return response.evaluated

    async def EvaluateStream(
        self, request: pb.EvaluateStreamRequest, context: Context
    ) -> AsyncIterator[pb.EvaluateStreamResponse]:
        """Yield progress, the maps of randomised networks and the response of Evaluate."""
        async for message in self._run("EvaluateStream", request.request, context, request.heartbeats_only):
            match message.WhichOneof("step"):
                case "progress":
                    yield pb.EvaluateStreamResponse(progress=message.progress)
                case "randomised":
                    yield pb.EvaluateStreamResponse(randomised=message.randomised)
                case _:
                    yield pb.EvaluateStreamResponse(result=message.evaluated)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Return the configured models."""
        return await self.forward(self._lists.ListModels, request, context)

    async def ListMethods(self, request: pb.ListMethodsRequest, context: Context) -> pb.ListMethodsResponse:
        """Return the methods, with the rows that they take if the request names a model."""
        return await self.forward(self._lists.ListMethods, request, context)

    async def ListMetrics(self, request: pb.ListMetricsRequest, context: Context) -> pb.ListMetricsResponse:
        """Return the metrics."""
        return await self.forward(self._lists.ListMetrics, request, context)

    async def count_refusal(self, rpc: str, code: str) -> None:
        """Count a refused call in the metrics of the engine process."""
        try:
            await self._link.CountRefusal(link_pb2.CountRefusalRequest(rpc=rpc, code=code))
        except grpc.aio.AioRpcError as error:  # the caller must receive its refusal in any case
            log.warning("a refused call is not counted", rpc=rpc, code=code, reason=error.details())

    async def forward(self, call: Callable[..., Awaitable[T]], request: object, context: Context) -> T:
        """Return the response of the engine process.

        Args:
            call: The method of its stub.
            request: The message of the caller.
            context: The context of the caller's call.
        """
        try:
            return await call(request, timeout=context.time_remaining(), metadata=identity.metadata_of(context))
        except grpc.aio.AioRpcError as error:
            return await _relay(error, context)

    async def _run(
        self,
        rpc: str,
        request: pb.ExplainRequest | pb.EvaluateRequest,
        context: Context,
        heartbeats_only: bool = False,
    ) -> AsyncIterator[link_pb2.RunResponse]:
        """Run a call in the engine process; yield its events and finally its result."""
        sizes = DataSizes.of(request)
        start = link_pb2.Start(
            front_end=self._identifier,
            rpc=rpc,
            image_bytes=sizes.image,
            saliency_bytes=sizes.saliency,
            mask_bytes=sizes.mask,
            call=next(self._calls),
            heartbeats_only=heartbeats_only,
        )
        cached = self._config.cache is not None
        rest: Any = await self.codec.run(digested, request) if cached else messages.without_data(request)
        (start.explain if isinstance(request, pb.ExplainRequest) else start.evaluate).CopyFrom(rest)
        link: LinkCall = self._link.Run(timeout=context.time_remaining(), metadata=identity.metadata_of(context))
        with ExitStack() as ends:
            ends.callback(link.cancel)  # without effect if the call has ended
            try:
                await _send(link, link_pb2.RunRequest(start=start))
                admitted = (await _receive(link)).admitted
                structlog.contextvars.bind_contextvars(request_id=admitted.request_id)
                preprocessing = messages.preprocessing(admitted)
                slot = None
                try:
                    if not admitted.cached:
                        slot = ends.enter_context(
                            _Slot(self._slots, preprocessing, partial(self._wait_until_unused, start.call))
                        )
                    await announce(context, admitted.request_id)
                    if slot is not None:
                        decoded = await self.codec.run(
                            slot.write, self._memory, request, preprocessing, self._config.max_image_pixels
                        )
                except Exception as error:
                    await _fail(link, error)
                if slot is not None:
                    await _send(link, link_pb2.RunRequest(decoded=decoded))
                while (message := await _receive(link)).WhichOneof("step") not in ("explained", "evaluated"):
                    yield message
                try:
                    if message.HasField("unfinished"):
                        await self.codec.run(messages.finish, message, preprocessing.size)
                    finished = message.explained if message.HasField("explained") else message.evaluated
                    bounds.check_response(finished, self._config)
                except Exception as error:
                    await _fail(link, error)
                await _send(link, link_pb2.RunRequest(finished=link_pb2.Finished()))
                await link.read()  # returns at the end of the call, which the engine process then has logged
                if slot is not None:
                    slot.unused = True
                yield message
            except grpc.aio.AioRpcError as error:
                await _relay(error, context)

    async def _wait_until_unused(self, call: int) -> None:
        """Return when the engine process does not read the image of a call any more."""
        with contextlib.suppress(grpc.aio.AioRpcError):  # the engine process has ended
            await self._link.WaitUntilUnused(link_pb2.WaitUntilUnusedRequest(front_end=self._identifier, call=call))


class _Slot:
    """A slot for the image of one call. It is free again when no thread writes to it and the engine does not read it.

    All methods but `write` belong to the event loop.

    Args:
        slots: The slots of the front end.
        preprocessing: The preprocessing of the model.
        wait_until_unused: Returns when the engine process does not read the slot any more.

    Attributes:
        unused: The call ended normally, so that the engine process does not read the slot any more.
    """

    def __init__(
        self, slots: Slots, preprocessing: Preprocessing, wait_until_unused: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        self.unused = False
        self._wait_until_unused = wait_until_unused
        self._loop = asyncio.get_running_loop()
        self._slots = slots
        self._shape = (*preprocessing.size, preprocessing.channels)
        self._offset = slots.take(self._shape)
        self._users = 2  # the call, and the thread that writes
        self._begun = threading.Lock()  # acquired by the thread that writes, or at the end of the call

    def __enter__(self) -> _Slot:
        return self

    def __exit__(self, *_: object) -> None:
        if self._begun.acquire(blocking=False):  # `write` has not begun, and may not begin any more
            self._leave()
        if self.unused:
            self._leave()
        else:
            task = self._loop.create_task(self._wait_until_unused())
            _waiting.add(task)  # the loop has only weak references to tasks
            task.add_done_callback(_waiting.discard)
            task.add_done_callback(lambda _: self._leave())

    def write(
        self,
        memory: SharedMemory,
        request: pb.ExplainRequest | pb.EvaluateRequest,
        preprocessing: Preprocessing,
        max_image_pixels: int,
    ) -> link_pb2.Decoded:
        """Decode the pixels of a request, and write the image to the slot. Call it once, in a codec thread.

        Returns:
            The message for the engine process.

        Raises:
            CamserveError: The pixels cannot be read or have wrong values.
        """
        if not self._begun.acquire(blocking=False):
            raise asyncio.CancelledError  # the call has ended, and the slot may belong to another one
        try:
            image, warnings = decode_image(request.image, preprocessing, max_image_pixels)
            row = memory.image(self._offset, self._shape)
            for i, channel in enumerate(image.numpy()):
                row[..., i] = channel
            decoded = link_pb2.Decoded(offset=self._offset, input_digest=digest(image), warnings=warnings)
            if isinstance(request, pb.EvaluateRequest) and request.HasField("saliency"):
                set_tensor(decoded.saliency, decode_saliency(request.saliency))
            if request.truth.HasField("mask"):
                decoded.mask = decode_mask(request.truth.mask, preprocessing.size).tobytes()
            return decoded
        finally:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._slots.release(self._offset, self._shape)


async def _fail(link: LinkCall, error: Exception) -> NoReturn:
    """End a call with an error of this front end.

    Raises:
        AioRpcError: The status with which the engine process ends the call.
    """
    if not isinstance(error, CamserveError):
        log.error("unexpected exception", exc_info=error)
        error = InternalError("an internal error; the server's log describes it under this request_id")
    await _send(link, link_pb2.RunRequest(failed=messages.failure(error)))
    await _receive(link)
    raise RuntimeError("the engine process has not ended a call that has failed")


async def _send(link: LinkCall, message: link_pb2.RunRequest) -> None:
    """Send a message, unless the call has ended. Then the next `_receive` raises its status."""
    with contextlib.suppress(asyncio.InvalidStateError):
        await link.write(message)


async def _receive(link: LinkCall) -> link_pb2.RunResponse:
    """Return the next message. Raises AioRpcError if the call has failed."""
    message: Any = await link.read()
    if message is grpc.aio.EOF:
        raise RuntimeError("the engine process has ended a call before its result")
    response: link_pb2.RunResponse = message
    return response


async def _relay(error: grpc.aio.AioRpcError, context: Context) -> NoReturn:
    """End the call of a caller with the status of the call on the link.

    A status without details is not one of camserve: the engine process stops, or has ended. The caller can then try
    another server.
    """
    ended = error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    if ended and all(key != "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ()):
        stopped = Unavailable("the server has shut down; try another one", retry_after_s=1.0)
        request_id = structlog.contextvars.get_contextvars().get("request_id", "")
        details = status.trailing_metadata(stopped, request_id, context.time_remaining())
        await context.abort(status.code(stopped), stopped.message, details)
    metadata = tuple((key, value) for key, value in error.trailing_metadata() if key in RELAYED)
    await context.abort(error.code(), error.details() or "", metadata)
    raise AssertionError("abort raises")
