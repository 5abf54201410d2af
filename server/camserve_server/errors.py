"""What can go wrong, in one small tree; each knows its gRPC code.

CamserveError
├── InvalidArgument      INVALID_ARGUMENT     the request is wrong: `field` says where
│   └── OutOfRange       INVALID_ARGUMENT     a value outside what is allowed
├── NotFound             NOT_FOUND            no such model, method or metric: `metadata["known"]` lists them
├── Unservable           FAILED_PRECONDITION  this model cannot serve this method
├── TooLarge             RESOURCE_EXHAUSTED   larger than this server will ever take: no use to try again
├── QueueFull            RESOURCE_EXHAUSTED   too many rows owed: try again after `retry_after_s`
├── OutOfMemory          RESOURCE_EXHAUSTED   even one row does not fit
├── Unavailable          UNAVAILABLE          loading or draining: try again, perhaps elsewhere
├── Unauthenticated      UNAUTHENTICATED      no token, or an unknown one
├── PermissionDenied     PERMISSION_DENIED    a known caller, who may not do this
├── Expired              DEADLINE_EXCEEDED    the caller's deadline passed while waiting or running
├── Cancelled            CANCELLED            the caller went away
└── InternalError        INTERNAL             our bug; its traceback stays in the log
ConfigError              raised at start: the configuration names something that is not so
"""

from __future__ import annotations

# In bytes. They quote what the caller sent, and gRPC drops an answer whose metadata takes more than 8 KiB.
MAX_MESSAGE = 1000
MAX_FIELD = 200


class CamserveError(Exception):
    """An error that a caller gets to see.

    `message` says what was wrong, what was expected and what to do; `field` names the request's field at fault;
    `reason` is a constant for programs; `retry_after_s` is None where trying again is of no use.
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
    """The request is wrong."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID"


class OutOfRange(InvalidArgument):
    """A value lies outside what is allowed."""

    reason = "OUT_OF_RANGE"


class NotFound(CamserveError):
    """There is no model, method or metric of that name."""

    code = "NOT_FOUND"
    reason = "UNKNOWN_NAME"


class Unservable(CamserveError):
    """The model cannot serve the method."""

    code = "FAILED_PRECONDITION"
    reason = "UNSERVABLE"


class TooLarge(CamserveError):
    """Larger than this server will ever take."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_LARGE"


class QueueFull(CamserveError):
    """Too many rows are owed already."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"


class OutOfMemory(CamserveError):
    """Even one row of the request does not fit into the device's memory."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"


class Unavailable(CamserveError):
    """The server is loading or draining."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class Unauthenticated(CamserveError):
    """The caller has no token, or an unknown one."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(CamserveError):
    """The caller is known, and may not do this."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class Expired(CamserveError):
    """The caller's deadline passed."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Cancelled(CamserveError):
    """The caller went away."""

    code = "CANCELLED"
    reason = "CANCELLED"


class InternalError(CamserveError):
    """A bug of ours."""

    code = "INTERNAL"
    reason = "INTERNAL"


class ConfigError(Exception):
    """The configuration names something that is not so; the message names the key."""


def _clipped(text: str, most: int) -> str:
    """As much of it as fits into so many bytes of UTF-8."""
    encoded = text.encode(errors="replace")
    return text if len(encoded) <= most else encoded[: most - 3].decode(errors="ignore") + "…"
