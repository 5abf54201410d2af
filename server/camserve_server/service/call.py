"""One RPC under way: what its log line, its metrics and its trace will say."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from camserve_server.engine.job import Job
from camserve_server.errors import InvalidArgument

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Context = grpc.aio.ServicerContext[Any, Any]
MAX_REQUEST_ID = 128


@dataclass(eq=False)
class Call:
    """`method` is that of explanation: "" where there is none, "other" where there is none of that name.

    Times are of `time.monotonic()`.
    """

    rpc: str
    context: Context
    request_id: str
    method: str = ""
    facts: dict[str, object] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    job: Job[Any] | None = None  # once the request is read and admitted
    span: Span | None = None


def checked_request_id(given: str) -> str:
    """The caller's own, or a new one. Raises InvalidArgument for one that is too long or not printable."""
    if len(given) > MAX_REQUEST_ID or not given.isprintable():
        raise InvalidArgument(f"at most {MAX_REQUEST_ID} printable characters are allowed", field="request_id")
    return given or uuid.uuid4().hex
