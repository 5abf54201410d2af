"""Conversion of response messages to results and events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from camserve import images, map_format, wire
from camserve.answers import (
    Cost,
    Evaluation,
    Explanation,
    LeftOut,
    Level,
    Prediction,
    Progress,
    Randomised,
    Replay,
    SaliencyMap,
    Score,
)
from camserve.errors import InternalError
from camserve.receipt import Receipt, differences
from camserve.v1 import explain_pb2 as pb

__all__ = ["evaluation", "event", "explanation", "replay"]

T = TypeVar("T")


def explanation(response: pb.ExplainResponse, image: pb.Image) -> Explanation:
    """Convert the response of `Explain`.

    Args:
        response: The response message.
        image: The image of the request.

    Returns:
        The explanation.

    Raises:
        InternalError: The response contains no map.
    """
    if not response.maps:
        raise InternalError("the response contains no saliency map", request_id=response.request_id)
    maps = tuple(_saliency_map(each, image) for each in response.maps)
    return Explanation(
        **vars(maps[0]),
        maps=maps,
        predictions=tuple(wire.to_dataclass(Prediction, each) for each in response.predictions),
        cost=wire.to_dataclass(Cost, response.cost),
        receipt=wire.to_dataclass(Receipt, response.receipt),
        request_id=response.request_id,
    )


def evaluation(response: pb.EvaluateResponse, image: pb.Image) -> Evaluation:
    """Convert the response of `Evaluate`.

    Args:
        response: The response message.
        image: The image of the request.

    Returns:
        The evaluation.

    Raises:
        InternalError: The response contains no map.
    """
    if not response.HasField("map"):
        raise InternalError("the response contains no saliency map", request_id=response.request_id)
    return Evaluation(
        **vars(_saliency_map(response.map, image)),
        cost=wire.to_dataclass(Cost, response.cost),
        receipt=wire.to_dataclass(Receipt, response.receipt),
        request_id=response.request_id,
    )


def replay(receipt: Receipt, now: Explanation) -> Replay:
    """Compare an explanation with an earlier receipt.

    Args:
        receipt: The earlier receipt.
        now: The new explanation.

    Returns:
        The comparison.
    """
    return Replay(
        same=now.receipt.map_digests == receipt.map_digests,
        explanation=now,
        differences=differences(receipt, now.receipt),
    )


def event(
    response: pb.ExplainStreamResponse | pb.EvaluateStreamResponse, parse_result: Callable[[Any], T]
) -> Progress | Level | Randomised | T | None:
    """Convert one event of a stream.

    Args:
        response: The response message.
        parse_result: Function that converts the last event.

    Returns:
        The event, or None for a kind of event that this version of the client does not know.
    """
    match response.WhichOneof("event"):
        case "progress":
            return wire.to_dataclass(Progress, response.progress)
        case "level":
            level: pb.Level = response.level  # type: ignore[union-attr] # Only ExplainStreamResponse has levels.
            maps = tuple(map_format.from_wire(each, level.input_size) for each in level.saliency)
            return wire.to_dataclass(Level, level, maps=maps)
        case "randomised":
            randomised = response.randomised
            return wire.to_dataclass(Randomised, randomised, saliency=images.from_wire(randomised.saliency))
        case "result":
            return parse_result(response.result)
        case _:
            return None


def _saliency_map(message: pb.SaliencyMap, image: pb.Image) -> SaliencyMap:
    return SaliencyMap(
        target=wire.to_dataclass(Prediction, message.target),
        saliency=map_format.from_wire(message.saliency, message.input_size),
        raw=images.from_wire(message.raw) if message.HasField("raw") else None,
        scores={each.metric: Score(each.value, each.unit, each.curve) for each in message.scores},
        warnings=tuple(message.warnings),
        share=message.share,
        left_out=tuple(wire.to_dataclass(LeftOut, each) for each in message.left_out),
        _image=image,
    )
