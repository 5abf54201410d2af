"""What arrives: bytes → messages, bounded before they are parsed.

A parser takes thirty times the memory of a message that is made of tiny fields, and a second for each megabyte of it,
while nothing else runs. Pictures, maps and masks are single fields of bytes, which cost nothing; all else in a request
is small.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from camserve.v1 import admin_pb2, explain_pb2
from camserve_server.errors import CamserveError, InvalidArgument, TooLarge

MAX_BESIDE_BYTES = 64 << 10

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
# gRPC parses the request of a call and runs its handler in one task.
_failure: ContextVar[CamserveError | None] = ContextVar("failure", default=None)

_REQUESTS: dict[str, type[Message]] = {
    f"/{service.full_name}/{rpc.name}": GetMessageClass(rpc.input_type)
    for file in (explain_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for rpc in service.methods
}


class Bounds(grpc.aio.ServerInterceptor):
    """Parses the requests of our own services. What is refused reaches the handler empty: it has to `check()`."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler: Any = await continuation(handler_call_details)
        kind = _REQUESTS.get(handler_call_details.method)
        if handler is not None and kind is not None:
            handler = handler._replace(request_deserializer=partial(_parsed, kind))
        return cast("Handler | None", handler)


def check() -> None:
    """Raises what is wrong with the message of the call under way. To be asked in the call's own task."""
    failure = _failure.get()
    if failure is not None:
        raise failure


def _parsed(kind: type[Message], data: bytes) -> Message:
    """The message; an empty one if it is refused."""
    try:
        return parse(kind, data)
    except CamserveError as error:  # an exception from here would reach the caller as a bug
        _failure.set(error)
        return kind()


def parse(kind: type[Message], data: bytes) -> Message:
    """Raises TooLarge, naming the field, or InvalidArgument."""
    try:
        _count(data, 0, len(data), cast(Descriptor, kind.DESCRIPTOR), "", 0)
        return kind.FromString(data)
    except (DecodeError, IndexError) as error:
        raise InvalidArgument("the message cannot be read: it breaks off, or is nested too deeply") from error


def _count(data: bytes, at: int, end: int, kind: Descriptor, path: str, count: int) -> int:
    """`count` and the bytes of the message at data[at:end] that are not in fields of type bytes. Raises TooLarge."""
    while at < end:
        begin = at
        tag, at = _varint(data, at)
        field = kind.fields_by_number.get(tag >> 3)
        length = 0
        match tag & 7:
            case 0:
                _, at = _varint(data, at)
            case 1:
                at += 8
            case 2:
                length, at = _varint(data, at)
            case 5:
                at += 4
        count += at - begin
        if at + length > end:
            raise IndexError("it breaks off")
        if field is not None and field.message_type is not None and _holds_bytes(field.message_type):
            count = _count(data, at, at + length, field.message_type, f"{path}{field.name}.", count)
        elif field is None or field.type != FieldDescriptor.TYPE_BYTES:
            count += length
        if count > MAX_BESIDE_BYTES:
            raise TooLarge(
                f"a request may have {MAX_BESIDE_BYTES} bytes beside its pictures, maps and masks; this one has more",
                field=f"{path}{field.name if field else ''}".removeprefix("request.").removesuffix("."),
            )
        at += length
    return count


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends. Raises IndexError."""
    number = shift = 0
    while data[at] & 0x80:
        number |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise IndexError("too long a number")
    return number | data[at] << shift, at + 1


@cache
def _holds_bytes(kind: Descriptor) -> bool:
    """Whether a message of that kind has a field of type bytes, however deep."""
    seen, left = set[str](), [kind]
    while left:
        each = left.pop()
        if each.full_name in seen:
            continue
        seen.add(each.full_name)
        if any(field.type == FieldDescriptor.TYPE_BYTES for field in each.fields):
            return True
        left += [field.message_type for field in each.fields if field.message_type is not None]
    return False
