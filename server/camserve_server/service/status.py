"""Convert errors to a gRPC status with google.rpc details (AIP-193)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from camserve_server.errors import CamserveError, InvalidArgument

Metadata = tuple[tuple[str, str | bytes], ...]


def code(error: CamserveError) -> grpc.StatusCode:
    """Return the gRPC status code of an error."""
    value: grpc.StatusCode = grpc.StatusCode[error.code]
    return value


def trailing_metadata(error: CamserveError, request_id: str, left_s: float | None = None) -> Metadata:
    """Return the trailing metadata of a failed call.

    The metadata contain `grpc-status-details-bin` and, for codes that clients retry, `grpc-retry-pushback-ms`. A
    negative pushback stops the automatic retries of the client. It is also sent if the wait would exceed the deadline:
    otherwise, the client would wait until its deadline and never report this error.

    Args:
        error: The error.
        request_id: The identifier of the request.
        left_s: The seconds until the caller's deadline; None for no deadline.
    """
    status = status_pb2.Status(code=code(error).value[0], message=error.message)
    for detail in _details(error, request_id):
        status.details.add().Pack(detail)
    metadata: Metadata = (("grpc-status-details-bin", status.SerializeToString()),)
    if error.code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"):
        wait_s = error.retry_after_s
        hopeless = wait_s is None or (left_s is not None and wait_s >= left_s)
        metadata += (("grpc-retry-pushback-ms", "-1" if hopeless else str(math.ceil(1e3 * (wait_s or 0)))),)
    return metadata


def _details(error: CamserveError, request_id: str) -> Sequence[Message]:
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain="camserve",
            metadata={**error.metadata, **({"field": error.field} if error.field else {})},
        )
    ]
    if isinstance(error, InvalidArgument) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(1e9 * error.retry_after_s))
        details.append(retry)
    details.append(error_details_pb2.RequestInfo(request_id=request_id))
    return details
