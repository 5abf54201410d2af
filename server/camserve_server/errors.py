"""The errors of the server. Each class has its gRPC status code.

CamserveError
├── InvalidArgument      INVALID_ARGUMENT     a field of the request is wrong; `field` names it
│   └── OutOfRange       INVALID_ARGUMENT     a value is outside its range
├── NotFound             NOT_FOUND            no model, method or metric has this name; `metadata["known"]` lists them
├── Unservable           FAILED_PRECONDITION  the model cannot serve the method, or is not loaded
├── TooLarge             RESOURCE_EXHAUSTED   the request is larger than the server accepts; a retry fails, too
├── QueueFull            RESOURCE_EXHAUSTED   too many rows are owed; retry after `retry_after_s`
├── OutOfMemory          RESOURCE_EXHAUSTED   one row does not fit into the device's memory
├── Unavailable          UNAVAILABLE          the server, or that of a remote model, is not available; retry later
├── Unauthenticated      UNAUTHENTICATED      the call has no token, or an unknown one
├── PermissionDenied     PERMISSION_DENIED    the caller is known but does not have the right
├── Expired              DEADLINE_EXCEEDED    the deadline passed before the end of the request
├── Cancelled            CANCELLED            the caller cancelled the call
├── RemoteFailed         INTERNAL             the server that runs a remote model reports an error
└── InternalError        INTERNAL             a bug of the server; the traceback is in the log only
ConfigError              raised at the start: the configuration is invalid
"""

from __future__ import annotations

# Limits in bytes. Messages quote fields of the request, and gRPC drops a response with more than 8 KiB of metadata.
MAX_MESSAGE = 1000
MAX_FIELD = 200


class CamserveError(Exception):
    """An error that the caller receives.

    Args:
        message: The problem, the expected value and the remedy.
        field: The wrong field of the request; empty if no field is wrong.
        reason: A constant for programs; by default, that of the class.
        metadata: Further facts for programs.
        retry_after_s: The seconds after which a retry may succeed; None if a retry cannot succeed.

    Attributes:
        code: The name of the gRPC status code.
    """

    code = "UNKNOWN"
    reason = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        reason: str = "",
        metadata: dict[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = _clipped(message, MAX_MESSAGE)
        self.field = _clipped(field, MAX_FIELD)
        self.reason = reason or type(self).reason
        self.metadata = metadata or {}
        self.retry_after_s = retry_after_s


class InvalidArgument(CamserveError):
    """A field of the request is wrong."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID"


class OutOfRange(InvalidArgument):
    """A value is outside its range."""

    reason = "OUT_OF_RANGE"


class NotFound(CamserveError):
    """No model, method or metric has this name."""

    code = "NOT_FOUND"
    reason = "UNKNOWN_NAME"


class Unservable(CamserveError):
    """The model cannot serve the method, or it is not loaded."""

    code = "FAILED_PRECONDITION"
    reason = "UNSERVABLE"


class TooLarge(CamserveError):
    """The request is larger than the server accepts."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_LARGE"


class QueueFull(CamserveError):
    """Too many rows are owed."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"


class OutOfMemory(CamserveError):
    """One row of the request does not fit into the device's memory."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"


class Unavailable(CamserveError):
    """The server is loading or shutting down, or the server of a remote model cannot be reached."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class Unauthenticated(CamserveError):
    """The call has no token, or an unknown one."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(CamserveError):
    """The caller is known but does not have the right."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class Expired(CamserveError):
    """The deadline passed before the end of the request."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Cancelled(CamserveError):
    """The caller cancelled the call."""

    code = "CANCELLED"
    reason = "CANCELLED"


class InternalError(CamserveError):
    """A bug of the server."""

    code = "INTERNAL"
    reason = "INTERNAL"


class RemoteFailed(CamserveError):
    """The server that runs a remote model reports an error, or its answer is malformed."""

    code = "INTERNAL"
    reason = "REMOTE_FAILED"


OF_WHOLE_BATCH = (Unavailable, Expired, Cancelled)
"""Errors of a forward pass that do not depend on its rows: parts of the batch would fail, too."""


class ConfigError(Exception):
    """The configuration is invalid. The message begins with the key."""


def describe(error: Exception) -> str:
    """Return the type and the first line of an error, at most 300 characters. Assertions often have no text."""
    text = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _clipped(text: str, max_bytes: int) -> str:
    """Return the text, shortened to `max_bytes` bytes of UTF-8."""
    encoded = text.encode(errors="replace")
    return text if len(encoded) <= max_bytes else encoded[: max_bytes - 3].decode(errors="ignore") + "…"
