"""The engine process's end of the link: it runs the calls that front ends pass on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from camserve.v1 import explain_pb2 as pb
from camserve_server.config import Config
from camserve_server.engine.job import Job
from camserve_server.maps import boxes
from camserve_server.plan import Image, Truth
from camserve_server.request_result import RequestResult
from camserve_server.service import requests, responses
from camserve_server.service.codec import CodecThreads
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
        self._config = config
        self._servicer = servicer
        self._metrics = metrics

    async def CountRefusal(self, request: link_pb2.CountRefusalRequest, context: Any) -> link_pb2.CountRefusalResponse:
        """Count a call that a front end has refused."""
        await self._metrics.refused(request.rpc, request.code)
        return link_pb2.CountRefusalResponse()

    async def Run(self, _: object, context: Context) -> None:  # type: ignore[override]  # the stubs know generators only
        """Run one call of Explain, Evaluate or their streams."""
        first = await _read(context)
        if first is None:
            return
        start = first.start
        request = messages.restored_request(start)
        front_end = _FrontEnd(context, self.memories[start.front_end], self._servicer.codec)
        arguments: Any = (
            (request, context, requests.parse_explain, _explained)
            if isinstance(request, pb.ExplainRequest)
            else (request, context, requests.parse_evaluate, _evaluated)
        )
        async for message in self._servicer.run(
            start.rpc, *arguments, kinds=_KINDS[start.rpc], decode=front_end.decode, delivered=front_end.finished
        ):
            await context.write(_response(message))


@dataclass(frozen=True)
class _FrontEnd:
    """The front end of one call."""

    context: Context
    memory: SharedMemory
    codec: CodecThreads

    async def decode(self, request_id: str, parsed: ParsedRequest) -> Pixels:
        """Let the front end decode the pixels. Raises CamserveError."""
        wanted = parsed.model.preprocessing
        admitted = link_pb2.Admitted(
            request_id=request_id,
            size=wanted.size,
            mean=wanted.mean,
            std=wanted.std,
            interpolation=wanted.interpolation,
        )
        await self.context.write(link_pb2.RunResponse(admitted=admitted))
        answer = await _read(self.context)
        assert answer is not None, "a front end closes its side after the result"
        if answer.HasField("failed"):
            raise messages.error(answer.failed)
        model, decoded = parsed.model, answer.decoded
        shared = self.memory.image(decoded.offset, (wanted.channels, *wanted.size))
        if model.device.type == "cpu" and model.dtype == torch.float32 and not (parsed.boxes or decoded.mask):
            return self._pixels(parsed, decoded, *shared)  # copies nothing
        return await self.codec.run(self._pixels, parsed, decoded, *shared)

    def _pixels(self, parsed: ParsedRequest, decoded: link_pb2.Decoded, tensor: Any, row: Any) -> Pixels:
        model, size = parsed.model, parsed.model.preprocessing.size
        image = model.image(torch.from_numpy(tensor))
        if model.device.type == "cpu":
            if model.dtype == torch.float32:
                image = _with_row(image, torch.from_numpy(row))
            else:
                _ = image.row
        saliency = messages.values(decoded.saliency) if decoded.HasField("saliency") else None
        truth: Truth | None = None
        if parsed.boxes or decoded.mask:
            mask = messages.mask(decoded.mask, size) if decoded.mask else None
            truth = boxes.make_truth([*parsed.boxes], mask, size)
        return Pixels(image, saliency, truth)

    async def finished(self) -> None:
        """Wait until the front end has finished the response. Raises CamserveError if it cannot."""
        answer = await _read(self.context)
        if answer is not None:
            raise messages.error(answer.failed)


def _with_row(image: Image, row: torch.Tensor) -> Image:
    """Set the row of an image to the values that the front end has written, channels last [H, W, C]."""
    vars(image)["row"] = row.permute(2, 0, 1)[None]  # the cached value of the property
    return image


def _explained(
    request_id: str,
    parsed: ParsedRequest,
    _: Image,
    job: Job[RequestResult],
    result: RequestResult,
    warnings: Sequence[str],
) -> link_pb2.RunResponse:
    response = responses.explain_outline(request_id, parsed, job, result)
    message = link_pb2.RunResponse()
    if not _add_unfinished(message, parsed, result, warnings):
        responses.add_maps(response.maps, response.receipt, result, parsed.map_format, warnings)
    message.explained.CopyFrom(response)
    return message


def _evaluated(
    request_id: str,
    parsed: ParsedRequest,
    _: Image,
    job: Job[RequestResult],
    result: RequestResult,
    warnings: Sequence[str],
) -> link_pb2.RunResponse:
    response = responses.evaluate_outline(request_id, parsed, job, result)
    message = link_pb2.RunResponse()
    if not _add_unfinished(message, parsed, result, warnings):
        responses.add_maps([response.map], response.receipt, result, parsed.map_format, warnings)
    message.evaluated.CopyFrom(response)
    return message


def _add_unfinished(
    message: link_pb2.RunResponse, parsed: ParsedRequest, result: RequestResult, warnings: Sequence[str]
) -> bool:
    """Add the unfinished maps to a result. Return False if they are finished or only this process can finish them."""
    raw = result.unfinished
    if raw is None or raw.dtype not in (torch.float32, torch.float64):
        return False
    messages.set_unfinished(message.unfinished, raw, parsed.map_format, warnings)
    return True


def _response(message: StreamMessage | link_pb2.RunResponse) -> link_pb2.RunResponse:
    """Return the message of the link for an event or a result."""
    match message:
        case pb.Progress():
            return link_pb2.RunResponse(progress=message)
        case pb.Level():
            return link_pb2.RunResponse(level=message)
        case pb.Randomised():
            return link_pb2.RunResponse(randomised=message)
        case _:
            return message


async def _read(context: Context) -> link_pb2.RunRequest | None:
    """Return the next message of the front end; None if it has closed its side."""
    message: Any = await context.read()
    return None if message is grpc.aio.EOF else message
