"""The record of one call, for its log line, its metrics and its trace."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from camserve_server.engine.job import Job
from camserve_server.errors import CamserveError, Cancelled, Expired, InvalidArgument

if TYPE_CHECKING:  # opentelemetry is an optional dependency
    from opentelemetry.trace import Span

Context = grpc.aio.ServicerContext[Any, Any]
MAX_REQUEST_ID = 128
# Key of the initial metadata of an admitted call. The value is the identifier of the request, UTF-8.
ADMITTED = "camserve-request-id-bin"
# A client cancels its call at its deadline. The server computes its own deadline when the call arrives, which is later.
# Therefore a cancellation in this last part of the time counts as expired.
EXPIRED_SHARE = 0.1


@dataclass(eq=False)
class Call:
    """The record of one call.

    Attributes:
        rpc: The name of the RPC.
        context: The context of the call.
        request_id: The identifier of the request.
        method: The explanation method; empty if the request has none, "other" if it is unknown.
        facts: Further values for the log line.
        started: The arrival, on the clock of `time.monotonic()`.
        after_unexpected: Is called after an unexpected exception.
        job: The job of the request; None until the request is submitted to the engine.
        span: The span of the call; None if the call is not traced.
    """

    rpc: str
    context: Context
    request_id: str
    method: str = ""
    facts: dict[str, object] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    after_unexpected: Callable[[], object] = lambda: None
    job: Job[Any] | None = None
    span: Span | None = None


async def announce(context: Context, request_id: str) -> None:
    """Send the initial metadata of an admitted call, which contain the identifier of the request.

    gRPC does not repeat a call whose initial metadata it has received, so the server executes each call once at most,
    although proxies report their timeouts with statuses that clients retry.

    Args:
        context: The context of the call.
        request_id: The identifier of the request.
    """
    # If the connection is lost, gRPC also cancels the call.
    with suppress(grpc.aio.InternalError):
        await context.send_initial_metadata(((ADMITTED, request_id.encode()),))


def checked_request_id(request_id: str) -> str:
    """Return the identifier that the caller sent, or a new one if it is empty.

    Raises:
        InvalidArgument: The identifier is too long or contains a character that is not printable.
    """
    if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
        raise InvalidArgument(
            f"request_id has {len(request_id)} characters; expected at most {MAX_REQUEST_ID} printable characters",
            field="request_id",
        )
    return request_id or uuid.uuid4().hex


def deadline(context: Context) -> float | None:
    """Return the caller's deadline on the clock of `time.monotonic()`; None if there is none."""
    left = context.time_remaining()
    return None if left is None or not math.isfinite(left) else time.monotonic() + left


def cancellation(started: float, expires: float | None) -> CamserveError:
    """Return the error of a call that gRPC cancels now: its deadline has passed, or the caller has cancelled it.

    Args:
        started: The arrival of the call, on the clock of `time.monotonic()`.
        expires: Its deadline on the same clock; None if there is none.
    """
    late = expires is not None and time.monotonic() >= expires - EXPIRED_SHARE * (expires - started)
    return Expired("the deadline passed") if late else Cancelled("the caller cancelled the call")
