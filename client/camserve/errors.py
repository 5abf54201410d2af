"""Exceptions of the client. Each class corresponds to one gRPC status code.

CamserveError
├── InvalidArgument      INVALID_ARGUMENT     an argument is invalid; `field` names it (also a ValueError)
├── NotFound             NOT_FOUND            no such model, method or metric; `metadata` lists the known names
├── FailedPrecondition   FAILED_PRECONDITION  the model does not support the method, is unloaded, or cannot be loaded
├── ResourceExhausted    RESOURCE_EXHAUSTED   server busy (retry after `retry_after_s`), or out of memory
│   └── TooLarge         RESOURCE_EXHAUSTED   request or response too large for server, proxy or client
├── Unavailable          UNAVAILABLE          server unreachable, loading its models, or shutting down
├── DeadlineExceeded     DEADLINE_EXCEEDED    no response within the timeout
├── Cancelled            CANCELLED            the call was cancelled
├── Unauthenticated      UNAUTHENTICATED      missing or unknown credentials
├── PermissionDenied     PERMISSION_DENIED    the credentials do not permit the call
└── InternalError        INTERNAL             bug of the server; report the `request_id` to its operator

Most errors come from the server. The client itself raises InvalidArgument and TooLarge if it detects the problem before
it sends the request. Errors of proxies become the class that corresponds to the problem. The client raises OSError if a
file cannot be read, and TypeError if an argument has an unsupported type.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from camserve import error_details, intermediaries

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
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
]


class CamserveError(Exception):
    """Base class of all errors of a call. Status codes without a subclass raise it directly.

    Attributes:
        code: The gRPC status code.
        message: Description of the problem.
        field: Name of the invalid field of the request. May be empty.
        reason: Constant that identifies the problem for programs, such as "QUEUE_FULL". May be empty.
        metadata: Further details by name.
        retry_after_s: Seconds after which a retry may succeed. None if a retry is useless or no time is known.
        request_id: Name of the request in the server's log. Empty if the request did not reach the server.
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
        values = {"field": self.field, "request": self.request_id}
        context = ", ".join(f"{name} {value}" for name, value in values.items() if value)
        return f"{self.message} [{context}]" if context else self.message


class InvalidArgument(CamserveError, ValueError):
    """An argument is invalid; `field` names it."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(CamserveError):
    """The server has no model, method or metric of this name; `metadata` lists the known names."""

    code = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(CamserveError):
    """The model does not support the method, is unloaded, or cannot be loaded."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhausted(CamserveError):
    """The server is busy (`retry_after_s` is set), or it cannot process the request (`retry_after_s` is None)."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class TooLarge(ResourceExhausted):
    """The request or its response is larger than the server, a proxy or the client accepts. A retry fails, too."""


class Unavailable(CamserveError):
    """The server cannot be reached, is loading its models, or is shutting down."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(CamserveError):
    """The server did not respond within the timeout."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(CamserveError):
    """The call was cancelled."""

    code = grpc.StatusCode.CANCELLED


class Unauthenticated(CamserveError):
    """The credentials are missing or unknown."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(CamserveError):
    """The credentials do not permit the call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class InternalError(CamserveError):
    """The server has a bug, or its response violates the contract."""

    code = grpc.StatusCode.INTERNAL


_BY_CODE = {kind.code: kind for kind in CamserveError.__subclasses__()}


def from_rpc(error: grpc.RpcError, *, address: str, timeout_s: float | None, explains: bool = False) -> CamserveError:
    """Convert an error of gRPC to a CamserveError.

    Args:
        error: Error of a blocking or an asyncio call.
        address: Address of the server, for the message.
        timeout_s: Timeout of the call in seconds, for the message.
        explains: The call is one of `Explain`, `Evaluate` and their streams, whose start the server announces.

    Returns:
        The error of the class that corresponds to the status code.
    """
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code, message = error.code(), error.details() or ""
    details = error_details.read(error.trailing_metadata())
    if details is None:
        request_id = intermediaries.request_id_of(error.initial_metadata())
        code, message, reason = intermediaries.describe(
            code, message, address=address, timeout_s=timeout_s, started=request_id is not None, explains=explains
        )
        details = error_details.Details(reason=reason, request_id=request_id or "")
    kind = TooLarge if details.get("reason") == "TOO_LARGE" else _BY_CODE.get(code, CamserveError)
    translated = kind(message or code.name, **details)
    translated.code = code
    return translated
