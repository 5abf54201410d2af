"""The engine process's end of the link: it runs the calls that front ends pass on."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np
import torch
from google.protobuf.message import Message
from numpy.typing import NDArray

from camserve.v1 import explain_pb2 as pb
from camserve_server.config import Config
from camserve_server.engine.job import Job
from camserve_server.maps import boxes
from camserve_server.plan import Truth
from camserve_server.request_result import RequestResult
from camserve_server.service import requests, responses
from camserve_server.service.answers import Answer
from camserve_server.service.call import Call
from camserve_server.service.codec import CodecThreads
from camserve_server.service.decoding import DataSizes
from camserve_server.service.event_stream import StreamMessage
from camserve_server.service.frontends import link_pb2, link_pb2_grpc, messages
from camserve_server.service.frontends.shared_memory import SharedMemory
from camserve_server.service.prometheus import Metrics
from camserve_server.service.requests import ParsedRequest, Pixels
from camserve_server.service.servicer import Servicer

Context = grpc.aio.ServicerContext[link_pb2.RunRequest, link_pb2.RunResponse]

_KINDS: dict[str, Collection[type[StreamMessage]]] = {
    "Explain": (),
    "ExplainStream": (pb.Progress, pb.Level, pb.Randomised),
    "Evaluate": (),
    "EvaluateStream": (pb.Progress, pb.Randomised),
    "ModelInfer": (),
}


class LinkServicer(link_pb2_grpc.LinkServiceServicer):
    """Implements LinkService.

    Args:
        config: The configuration of the server.
        servicer: Runs the calls.
        metrics: Counts the refused calls.

    Attributes:
        memories: The shared memory of each front end by its identifier.
    """

    def __init__(self, config: Config, servicer: Servicer, metrics: Metrics) -> None:
        self.memories: dict[int, SharedMemory] = {}
        # For each call by its front end and its number there: set when neither the call nor its job reads the image.
        self._unused: dict[tuple[int, int], asyncio.Event] = {}
        self._config = config
        self._servicer = servicer
        self._metrics = metrics

    async def WaitUntilUnused(
        self, request: link_pb2.WaitUntilUnusedRequest, context: Any
    ) -> link_pb2.WaitUntilUnusedResponse:
        """Return when the image of a call is not read any more: after the current batch of a cancelled call."""
        unused = self._unused.get((request.front_end, request.call))
        if unused is not None:
            await unused.wait()
        return link_pb2.WaitUntilUnusedResponse()

    async def CountRefusal(self, request: link_pb2.CountRefusalRequest, context: Any) -> link_pb2.CountRefusalResponse:
        """Count a call that a front end has refused."""
        await self._metrics.refused(request.rpc, request.code)
        return link_pb2.CountRefusalResponse()

    def remove(self, front_end: int) -> None:
        """Forget a front end that has ended. Its memory is unmapped when no job reads it any more."""
        self.memories.pop(front_end, None)

    async def Run(self, _: object, context: Context) -> None:  # type: ignore[override]  # the stubs know generators only
        """Run one call of Explain, Evaluate or their streams."""
        start = (await _read(context)).start
        sizes = DataSizes(start.image_bytes, start.saliency_bytes, start.mask_bytes)
        front_end = _FrontEnd(context, self.memories[start.front_end], self._servicer.codec)
        arguments: Any = (
            (start.explain, context, partial(requests.parse_explain, sizes=sizes), EXPLAINED)
            if start.HasField("explain")
            else (start.evaluate, context, partial(requests.parse_evaluate, sizes=sizes), EVALUATED)
        )
        with self._reading((start.front_end, start.call), front_end):
            async for message in self._servicer.run(
                start.rpc,
                *arguments,
                kinds=(pb.Progress,) if start.heartbeats_only else _KINDS[start.rpc],
                heartbeats_only=start.heartbeats_only,
                front_end=front_end,
            ):
                await context.write(_response(message))

    @contextmanager
    def _reading(self, key: tuple[int, int], front_end: _FrontEnd) -> Iterator[None]:
        """Let `WaitUntilUnused` wait for the end of the context, and then for the end of the call's job.

        Args:
            key: Identifier of the front end, and the number of the call there.
            front_end: The front end of the call, which may take a slot for the image in the context.
        """
        unused, loop = self._unused.setdefault(key, asyncio.Event()), asyncio.get_running_loop()

        def end() -> None:
            self._unused.pop(key, None)
            unused.set()

        try:
            yield
        finally:
            job = front_end.call.job if front_end.call else None
            if job is None:
                end()
            else:
                job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(end))


@dataclass
class _FrontEnd:
    """The front end of one call. `call` is None until the call is admitted."""

    context: Context
    memory: SharedMemory
    codec: CodecThreads
    call: Call | None = None

    async def decode(self, call: Call, parsed: ParsedRequest) -> Pixels:
        """Let the front end announce the call and decode the pixels. Raises CamserveError."""
        wanted = parsed.model.preprocessing
        await self.announce(call, parsed, cached=False)
        answer = await _read(self.context)
        if answer.HasField("failed"):
            raise messages.error(answer.failed)
        model, decoded = parsed.model, answer.decoded
        image = self.memory.image(decoded.offset, (*wanted.size, wanted.channels))
        if model.device.type == "cpu" and model.dtype == torch.float32 and not (parsed.boxes or decoded.mask):
            return self._pixels(parsed, decoded, image)  # copies nothing
        return await self.codec.run(self._pixels, parsed, decoded, image)

    async def announce(self, call: Call, parsed: ParsedRequest, *, cached: bool = True) -> None:
        """Let the front end announce the call. If the result is cached, it decodes no pixels."""
        self.call, wanted = call, parsed.model.preprocessing
        admitted = link_pb2.Admitted(
            request_id=call.request_id,
            size=wanted.size,
            mean=wanted.mean,
            std=wanted.std,
            interpolation=wanted.interpolation,
            cached=cached,
        )
        await self.context.write(link_pb2.RunResponse(admitted=admitted))

    def _pixels(self, parsed: ParsedRequest, decoded: link_pb2.Decoded, image: NDArray[np.float32]) -> Pixels:
        """Return the pixels of a request whose image the front end has written to its slot."""
        row = torch.from_numpy(image.transpose(2, 0, 1)[None])  # [1, C, H, W], channels last
        saliency = messages.values(decoded.saliency) if decoded.HasField("saliency") else None
        truth: Truth | None = None
        if parsed.boxes or decoded.mask:
            size = parsed.model.preprocessing.size
            mask = messages.mask(decoded.mask, size) if decoded.mask else None
            truth = boxes.make_truth([*parsed.boxes], mask, size)
        return Pixels(parsed.model.image_of_row(row), decoded.input_digest, saliency, truth, tuple(decoded.warnings))

    async def finished(self) -> None:
        """Wait until the front end has finished the response. Raises CamserveError if it cannot."""
        answer = await _read(self.context)
        if answer.HasField("failed"):
            raise messages.error(answer.failed)


def _explained(
    request_id: str,
    parsed: ParsedRequest,
    input_digest: str,
    job: Job[RequestResult],
    result: RequestResult,
    warnings: Sequence[str],
) -> link_pb2.RunResponse:
    response = responses.explain_outline(request_id, parsed, input_digest, job, result)
    message = link_pb2.RunResponse()
    if not _add_unfinished(message, parsed, result, warnings):
        responses.add_maps(response.maps, response.receipt, result, parsed.map_format, warnings)
    message.explained.CopyFrom(response)
    return message


def _evaluated(
    request_id: str,
    parsed: ParsedRequest,
    input_digest: str,
    job: Job[RequestResult],
    result: RequestResult,
    warnings: Sequence[str],
) -> link_pb2.RunResponse:
    response = responses.evaluate_outline(request_id, parsed, input_digest, job, result)
    message = link_pb2.RunResponse()
    if not _add_unfinished(message, parsed, result, warnings):
        responses.add_maps([response.map], response.receipt, result, parsed.map_format, warnings)
    message.evaluated.CopyFrom(response)
    return message


EXPLAINED = Answer[link_pb2.RunResponse](link_pb2.RunResponse, _explained, lambda message: message.explained)
EVALUATED = Answer[link_pb2.RunResponse](link_pb2.RunResponse, _evaluated, lambda message: message.evaluated)


def _add_unfinished(
    message: link_pb2.RunResponse, parsed: ParsedRequest, result: RequestResult, warnings: Sequence[str]
) -> bool:
    """Add the unfinished maps to a result. Return False if they are finished or only this process can finish them."""
    raw = result.unfinished
    if raw is None or raw.dtype not in (torch.float32, torch.float64):
        return False
    messages.set_unfinished(message.unfinished, raw, parsed.map_format, warnings)
    return True


def _response(message: Message) -> link_pb2.RunResponse:
    """Return the message of the link for an event or a result."""
    match message:
        case pb.Progress():
            return link_pb2.RunResponse(progress=message)
        case pb.Level():
            return link_pb2.RunResponse(level=message)
        case pb.Randomised():
            return link_pb2.RunResponse(randomised=message)
        case _:
            assert isinstance(message, link_pb2.RunResponse), "the only other message is the result"
            return message


async def _read(context: Context) -> link_pb2.RunRequest:
    """Return the next message of the front end.

    Raises:
        CancelledError: The call is cancelled.
    """
    message: Any = await context.read()
    if message is grpc.aio.EOF:  # front ends do not close their side, so the call is cancelled
        await asyncio.get_running_loop().create_future()  # gRPC cancels this task now
    request: link_pb2.RunRequest = message
    return request
