"""Parser of `grpc-status-details-bin`: a google.rpc.Status with details such as the invalid field or the retry delay.

This module declares the few messages that it needs in a descriptor pool of its own, under a different package name.
Their wire format is that of google/rpc/error_details.proto. The client therefore does not depend on
googleapis-common-protos, and the messages do not conflict with that package if it is installed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict

from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

_KEY = "grpc-status-details-bin"
_PACKAGE = "camserve.internal"

# Message name → fields as (number, name, type). `*` marks a repeated field. A map has the format of repeated pairs.
_MESSAGES: dict[str, list[tuple[int, str, str]]] = {
    "Status": [(1, "code", "int32"), (2, "message", "string"), (3, "details", "Any*")],
    "Any": [(1, "type_url", "string"), (2, "value", "bytes")],
    "Pair": [(1, "key", "string"), (2, "value", "string")],
    "Duration": [(1, "seconds", "int64"), (2, "nanos", "int32")],
    "FieldViolation": [(1, "field", "string"), (2, "description", "string")],
    "ErrorInfo": [(1, "reason", "string"), (2, "domain", "string"), (3, "metadata", "Pair*")],
    "BadRequest": [(1, "field_violations", "FieldViolation*")],
    "RetryInfo": [(1, "retry_delay", "Duration")],
    "RequestInfo": [(1, "request_id", "string")],
}


class Details(TypedDict, total=False):
    """Error details of a call. Keys without a value are absent."""

    field: str
    reason: str
    metadata: dict[str, str]
    retry_after_s: float
    request_id: str


def _build_pool() -> DescriptorPool:
    file = FileDescriptorProto(name="camserve/internal/status.proto", package=_PACKAGE, syntax="proto3")
    for message, fields in _MESSAGES.items():
        descriptor = file.message_type.add(name=message)
        for number, name, kind in fields:
            single = kind.rstrip("*")
            entry = descriptor.field.add(name=name, number=number)
            entry.label = Field.LABEL_OPTIONAL if single == kind else Field.LABEL_REPEATED
            if single in _MESSAGES:
                entry.type_name = f".{_PACKAGE}.{single}"
            else:
                entry.type = Field.Type.Value(f"TYPE_{single.upper()}")
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _build_pool()


def _parse(message: str, data: bytes) -> Any:
    return GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{message}")).FromString(data)


def read(trailing_metadata: Iterable[Any] | None) -> Details | None:
    """Parse the error details of a call.

    Args:
        trailing_metadata: Trailing metadata of the call, (key, value) pairs.

    Returns:
        The details, or None if there are none or if they are malformed.
    """
    serialized = next((value for key, value in trailing_metadata or () if key == _KEY), None)
    if serialized is None:
        return None
    details = Details()
    try:
        for detail in _parse("Status", serialized).details:
            match detail.type_url.rpartition(".")[2]:
                case "ErrorInfo":
                    info = _parse("ErrorInfo", detail.value)
                    details["reason"] = info.reason
                    details["metadata"] = {pair.key: pair.value for pair in info.metadata}
                    details["field"] = details["metadata"].get("field", "")  # A BadRequest overrides it.
                case "BadRequest":
                    violations = _parse("BadRequest", detail.value).field_violations
                    details["field"] = violations[0].field if violations else ""
                case "RetryInfo":
                    delay = _parse("RetryInfo", detail.value).retry_delay
                    details["retry_after_s"] = delay.seconds + delay.nanos / 1e9
                case "RequestInfo":
                    details["request_id"] = _parse("RequestInfo", detail.value).request_id
    except DecodeError:  # Report the error without its details rather than the malformed details.
        return None
    return details
