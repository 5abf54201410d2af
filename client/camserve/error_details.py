"""Reads `grpc-status-details-bin`: a google.rpc.Status, whose details say where a request was wrong and when to retry.

The few messages are declared here, under a package name and in a descriptor pool of our own: same wire format as
google/rpc/error_details.proto, but without googleapis-common-protos, and without a clash where that is installed too.
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

# message → its fields, each as (number, name, type); `*` means repeated. A map is on the wire a list of pairs.
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
    """What the details of a status say; only what is there."""

    field: str
    reason: str
    metadata: dict[str, str]
    retry_after_s: float
    request_id: str


def _declared() -> DescriptorPool:
    file = FileDescriptorProto(name="camserve/internal/status.proto", package=_PACKAGE, syntax="proto3")
    for message, fields in _MESSAGES.items():
        declared = file.message_type.add(name=message)
        for number, name, kind in fields:
            single = kind.rstrip("*")
            entry = declared.field.add(name=name, number=number)
            entry.label = Field.LABEL_OPTIONAL if single == kind else Field.LABEL_REPEATED
            if single in _MESSAGES:
                entry.type_name = f".{_PACKAGE}.{single}"
            else:
                entry.type = Field.Type.Value(f"TYPE_{single.upper()}")
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _declared()


def _parse(message: str, data: bytes) -> Any:
    return GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{message}")).FromString(data)


def read(trailing_metadata: Iterable[Any] | None) -> Details | None:
    """The details in a call's trailing metadata; None where there are none, or none that can be read."""
    packed = next((value for key, value in trailing_metadata or () if key == _KEY), None)
    if packed is None:
        return None
    details = Details()
    try:
        for detail in _parse("Status", packed).details:
            match detail.type_url.rpartition(".")[2]:
                case "ErrorInfo":
                    info = _parse("ErrorInfo", detail.value)
                    details["reason"] = info.reason
                    details["metadata"] = {pair.key: pair.value for pair in info.metadata}
                    details["field"] = details["metadata"].get("field", "")  # where there is no BadRequest
                case "BadRequest":
                    violations = _parse("BadRequest", detail.value).field_violations
                    details["field"] = violations[0].field if violations else ""
                case "RetryInfo":
                    delay = _parse("RetryInfo", detail.value).retry_delay
                    details["retry_after_s"] = delay.seconds + delay.nanos / 1e9
                case "RequestInfo":
                    details["request_id"] = _parse("RequestInfo", detail.value).request_id
    except DecodeError:  # the error itself matters more than its unreadable details
        return None
    return details
