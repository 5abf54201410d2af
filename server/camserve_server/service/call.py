"""One RPC under way: what its log line, its metrics and its trace will say."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from camserve_server.job import Job

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Context = grpc.aio.ServicerContext[Any, Any]


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
