"""Limits on the size of messages. Those of requests are checked before protobuf parses them.

Parsing a message of many small fields takes up to thirty times its size in memory and a second for each megabyte, and
it blocks the event loop. Images, maps and masks are single fields of type bytes, which are cheap to parse. All other
fields of a valid request are small.

Responses are checked, too: gRPC itself would refuse a large response after the call has been logged as successful, with
a status that clients retry.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from camserve.v1 import admin_pb2, explain_pb2
from camserve_server.config import Config
from camserve_server.errors import CamserveError, InvalidArgument, TooLarge

MAX_OTHER_BYTES = 64 << 10
# Bytes of the message of a stream around a response.
_ENVELOPE_BYTES = 16

M = TypeVar("M", bound=Message)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
# gRPC parses the request and runs the handler of a call in the same task.
_failure: ContextVar[CamserveError | None] = ContextVar("failure", default=None)

# Pixels as single values, which take up to four times their size in memory: 2 MiB of them count like MAX_OTHER_BYTES.
_VALUES = {f"inference.InferTensorContents.{name}" for name in ("uint_contents", "fp32_contents")}
_VALUES_PER_BYTE = 32


class SizeLimits(grpc.aio.ServerInterceptor):
    """Parses the requests of camserve's services within the limits.

    A handler receives an empty message instead of a refused one, so it must call `check`.

    Args:
        files: Files of further services.
    """

    def __init__(self, *files: FileDescriptor) -> None:
        self._requests: dict[str, type[Message]] = {
            f"/{service.full_name}/{rpc.name}": GetMessageClass(rpc.input_type)
            for file in (explain_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR, *files)
            for service in file.services_by_name.values()
            for rpc in service.methods
        }

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Replace the function that parses the requests of a call."""
        handler: Any = await continuation(handler_call_details)
        kind = self._requests.get(handler_call_details.method)
        if handler is not None and kind is not None:
            handler = handler._replace(request_deserializer=partial(_parsed, kind))
        return cast("Handler | None", handler)


def check() -> None:
    """Check the message of the current call. Call it in the task of the call.

    Raises:
        TooLarge: The message has too many bytes beside images, maps and masks.
        InvalidArgument: The message cannot be parsed.
    """
    failure = refusal()
    if failure is not None:
        raise failure


def refusal() -> CamserveError | None:
    """Return the error about the message of the current call, if there is one. Call it in the task of the call."""
    return _failure.get()


def refuse(error: CamserveError) -> None:
    """Let `check` raise an error in the current task. A front end has found it."""
    _failure.set(error)


def check_response(response: M, config: Config) -> M:
    """Return a response if it is not larger than the server's limit.

    Raises:
        TooLarge: The response is too large.
    """
    check_size(response.ByteSize() + _ENVELOPE_BYTES, config)
    return response


def check_size(size: int, config: Config) -> None:
    """Check the size of a response in bytes. Raises TooLarge."""
    if size > config.max_message_bytes:
        raise TooLarge(
            f"the response has {size / 2**20:.1f} MiB; max_message_bytes of the server permits "
            f"{config.max_message_bytes / 2**20:.1f} MiB; request fewer targets, or smaller maps by map_format"
        )


def _parsed(kind: type[Message], data: bytes) -> Message:
    """Parse a message; return an empty one and note the error if it is refused."""
    try:
        return parse(kind, data)
    except CamserveError as error:  # gRPC reports an exception of this function as an internal error
        _failure.set(error)
        return kind()


def parse(kind: type[Message], data: bytes) -> Message:
    """Parse a message within the limits.

    Args:
        kind: The class of the message.
        data: The encoded message.

    Raises:
        TooLarge: The message has too many bytes beside images, maps and masks; the error names the field.
        InvalidArgument: The message cannot be parsed.
    """
    try:
        _count(data, 0, len(data), cast(Descriptor, kind.DESCRIPTOR), "", 0)
        return kind.FromString(data)
    except (DecodeError, IndexError) as error:
        raise InvalidArgument(
            "the message cannot be read: it is truncated, not valid protobuf, or nested too deeply"
        ) from error


def _count(data: bytes, at: int, end: int, kind: Descriptor, path: str, count: int) -> int:
    """Add the bytes of data[at:end] that are not in fields of type bytes to `count`. Raises TooLarge."""
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
            raise IndexError("the message is truncated")
        if field is not None and field.message_type is not None and holds_bytes(field.message_type):
            count = _count(data, at, at + length, field.message_type, f"{path}{field.name}.", count)
        elif field is not None and field.full_name in _VALUES:
            count += length // _VALUES_PER_BYTE
        elif field is None or field.type != FieldDescriptor.TYPE_BYTES:
            count += length
        if count > MAX_OTHER_BYTES:
            remedy = "the image in raw_input_contents" if field and field.full_name in _VALUES else "fewer values"
            raise TooLarge(
                f"the request has more than {MAX_OTHER_BYTES} bytes beside images, maps and masks; send {remedy}",
                field=f"{path}{field.name if field else ''}".removeprefix("request.").removesuffix("."),
            )
        at += length
    return count


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint at data[at] and the position after it. Raises IndexError."""
    number = shift = 0
    while data[at] & 0x80:
        number |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise IndexError("the varint is too long")
    return number | data[at] << shift, at + 1


@cache
def holds_bytes(kind: Descriptor) -> bool:
    """Return True if a message of this kind has a field of type bytes at any depth."""
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
