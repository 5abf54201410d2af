"""Conversions between the messages of the link and the values of its two ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from numpy.typing import NDArray
from torch import Tensor

from camserve.v1 import explain_pb2 as pb
from camserve_server import errors
from camserve_server.errors import CamserveError
from camserve_server.models.pixels import Preprocessing
from camserve_server.plan import SaliencyMaps
from camserve_server.request_result import LazyMaps
from camserve_server.service import bounds
from camserve_server.service.frontends import link_pb2
from camserve_server.service.map_format import MapFormat
from camserve_server.service.responses import add_maps

M = TypeVar("M", bound=Message)


def _kinds(kind: type[CamserveError]) -> Iterator[type[CamserveError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _kinds(each)


_KINDS = {kind.__name__: kind for kind in _kinds(errors.CamserveError)}


def failure(error: CamserveError) -> link_pb2.Failure:
    """Return the message for an error."""
    return link_pb2.Failure(
        kind=type(error).__name__,
        message=error.message,
        field=error.field,
        reason=error.reason,
        metadata=error.metadata,
        retry_after_s=error.retry_after_s,
    )


def error(failure: link_pb2.Failure) -> CamserveError:
    """Return the error of a message."""
    return _KINDS[failure.kind](
        failure.message,
        field=failure.field,
        reason=failure.reason,
        metadata=dict(failure.metadata),
        retry_after_s=failure.retry_after_s if failure.HasField("retry_after_s") else None,
    )


def preprocessing(admitted: link_pb2.Admitted) -> Preprocessing:
    """Return the preprocessing of an admitted request."""
    height, width = admitted.size
    return Preprocessing(
        (height, width),
        tuple(admitted.mean),
        tuple(admitted.std),
        admitted.interpolation,  # type: ignore[arg-type]  # the engine process sends one of the literals
    )


def without_data(message: M) -> M:
    """Return a copy of a message without the values of its fields of type bytes: images, maps and masks.

    The message itself keeps them, because protobuf frees no part of a message.
    """
    copy = type(message)()
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_BYTES:
            setattr(copy, field.name, b"")  # keeps the kind of an image
        elif field.message_type is not None and bounds.holds_bytes(field.message_type):
            getattr(copy, field.name).CopyFrom(without_data(value))
        else:
            copy.MergeFrom(type(message)(**{field.name: value}))
    return copy


def values(tensor: pb.Tensor) -> Tensor:
    """Return the float32 values of a message."""
    return torch.from_numpy(np.frombuffer(tensor.data, "<f4").astype(np.float32).reshape(tuple(tensor.shape)))


def mask(data: bytes, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask [H, W] of one byte for each pixel."""
    return np.frombuffer(data, np.bool_).reshape(size).copy()  # torch warns about arrays that are read-only


def set_unfinished(
    message: link_pb2.UnfinishedMaps, raw: Tensor, map_format: MapFormat, warnings: Sequence[str]
) -> None:
    """Set the fields of a message.

    Args:
        message: An empty message.
        raw: The maps [T, h, w] of a method, float32 or float64, on the host.
        map_format: The format of the response.
        warnings: Warnings about the image and of the engine.
    """
    array = raw.numpy()
    message.shape.extend(array.shape)
    message.dtype, message.data = array.dtype.str, array.tobytes()
    message.format.dtype, message.format.native = map_format.dtype, map_format.native
    message.warnings.extend(warnings)


def finish(result: link_pb2.RunResponse, size: tuple[int, int]) -> None:
    """Finish the maps of a result and add them.

    Args:
        result: The result of Explain or Evaluate, with unfinished maps.
        size: (H, W), the input size of the model.
    """
    response = result.explained if result.HasField("explained") else result.evaluated
    given = result.unfinished
    raw = torch.from_numpy(np.frombuffer(given.data, given.dtype).reshape(tuple(given.shape)).copy())
    add_maps(
        response.maps if isinstance(response, pb.ExplainResponse) else [response.map],
        response.receipt,
        LazyMaps(SaliencyMaps(raw), size, None),
        MapFormat(given.format.dtype, given.format.native),
        given.warnings,
    )
