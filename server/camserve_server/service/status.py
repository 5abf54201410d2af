"""An error of ours as a gRPC status with google.rpc details (AIP-193)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from camserve_server.errors import CamserveError, InvalidArgument

Metadata = tuple[tuple[str, str | bytes], ...]


def code(error: CamserveError) -> grpc.StatusCode:
    """The gRPC code of the error."""
    found: grpc.StatusCode = grpc.StatusCode[error.code]
    return found


def trailing_metadata(error: CamserveError, request_id: str, left_s: float | None = None) -> Metadata:
    """`grpc-status-details-bin` and, where the code is one that clients retry, `grpc-retry-pushback-ms`.

    A negative pushback tells a client's own retries to stop. That is also said where the wait would outlast the
    `left_s` that the caller has: its retries would wait until then, and this error would never be seen.
    """
    status = status_pb2.Status(code=code(error).value[0], message=error.message)
    for detail in _details(error, request_id):
        status.details.add().Pack(detail)
    metadata: Metadata = (("grpc-status-details-bin", status.SerializeToString()),)
    if error.code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"):
        wait_s = error.retry_after_s
        useless = wait_s is None or (left_s is not None and wait_s >= left_s)
        metadata += (("grpc-retry-pushback-ms", "-1" if useless else str(math.ceil(1e3 * (wait_s or 0)))),)
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
