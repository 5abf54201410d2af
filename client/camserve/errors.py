"""What can go wrong, in one small tree; each knows its gRPC code.

CamserveError
├── InvalidArgument      INVALID_ARGUMENT     the request is wrong: `field` says where (a ValueError, too)
├── NotFound             NOT_FOUND            no such model, method or metric: `metadata` lists the known ones
├── FailedPrecondition   FAILED_PRECONDITION  this model cannot serve this method
├── ResourceExhausted    RESOURCE_EXHAUSTED   too busy (try again after `retry_after_s`) or too large (do not)
├── Unavailable          UNAVAILABLE          nobody answers, or the server is loading or draining
├── DeadlineExceeded     DEADLINE_EXCEEDED    no answer within the timeout
├── Cancelled            CANCELLED            the call was given up
├── Unauthenticated      UNAUTHENTICATED      no credentials, or unknown ones
├── PermissionDenied     PERMISSION_DENIED    credentials that do not allow this
└── InternalError        INTERNAL             a bug of the server: tell its operator the `request_id`

Most come from the server. InvalidArgument and ResourceExhausted are also raised before anything is sent, where the
client sees by itself what is wrong. A file that cannot be read stays the OSError that it is, and an argument of an
unsupported type is a TypeError.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from camserve import error_details

__all__ = [
    "CamserveError",
    "Cancelled",
    "DeadlineExceeded",
    "FailedPrecondition",
    "InternalError",
    "InvalidArgument",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
]


class CamserveError(Exception):
    """A call that failed. Raised as it is only for codes that have no class of their own.

    `message` says what was wrong and what to do; `field` names the request's field at fault and `reason` is a constant
    for programs (both may be empty); `metadata` holds further facts; `retry_after_s` is None where the server names no
    time or a retry is of no use; `request_id` is the server's name for the request, empty where it never got there.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    def __str__(self) -> str:
        named = {"field": self.field, "request": self.request_id}
        where = ", ".join(f"{name} {value}" for name, value in named.items() if value)
        return f"{self.message} [{where}]" if where else self.message


class InvalidArgument(CamserveError, ValueError):
    """The request is wrong; `field` says where."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(CamserveError):
    """There is no model, method or metric of that name."""

    code = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(CamserveError):
    """The model cannot serve the method."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhausted(CamserveError):
    """The server is too busy (`retry_after_s` says when to try again) or the request too large (it is None)."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(CamserveError):
    """Nobody answers at the address, or the server is loading or draining."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(CamserveError):
    """There was no answer within the timeout."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(CamserveError):
    """The call was given up."""

    code = grpc.StatusCode.CANCELLED


class Unauthenticated(CamserveError):
    """There were no credentials, or unknown ones."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(CamserveError):
    """The credentials do not allow this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class InternalError(CamserveError):
    """A bug of the server, or an answer that breaks the contract."""

    code = grpc.StatusCode.INTERNAL


_BY_CODE = {kind.code: kind for kind in CamserveError.__subclasses__()}


# What gRPC says of a connection that cannot be made, and what to do about it.
_HINTS = {
    "backend unhealthy": "it is loading its models, or draining",
    "WRONG_VERSION_NUMBER": "it speaks no TLS: leave out tls, ca and certificate",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is of no authority that is trusted here: give its authority as ca",
    "not in peer certificate": "its certificate is of another name than this address",
    "Socket closed": "it may ask for TLS (give tls or ca), or for a client's certificate (give certificate and key)",
}


def from_rpc(error: grpc.RpcError, *, address: str, timeout_s: float | None) -> CamserveError:
    """The CamserveError that says what a failed call says, sync or async."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code, message = error.code(), error.details() or ""
    details = error_details.read(error.trailing_metadata())
    if details is None and code is grpc.StatusCode.UNAVAILABLE:
        hint = next((f"; {hint}" for said, hint in _HINTS.items() if said in message), "")
        message = f"no answer from a camserve server at {address}: {message}{hint}"
    elif details is None and code is grpc.StatusCode.DEADLINE_EXCEEDED and timeout_s is not None:
        message = f"no answer from {address} within {timeout_s:g} s"
    translated = _BY_CODE.get(code, CamserveError)(message or code.name, **(details or {}))
    translated.code = code
    return translated
