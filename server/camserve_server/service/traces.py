"""Whether calls are traced, and which trace a call belongs to."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from camserve_server.errors import ConfigError
from camserve_server.service.call import Context

if TYPE_CHECKING:
    from camserve_server.service.spans import Traces

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def from_environment() -> Traces | None:
    """Traces if an endpoint is set for them. Raises ConfigError, naming the variable at fault."""
    endpoint = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    if endpoint is None or off:
        return None
    protocol = next((name for name in PROTOCOLS if os.environ.get(name)), None)
    if protocol and os.environ[protocol] != "grpc":
        raise ConfigError(f"{protocol}: traces are sent by grpc, not by {os.environ[protocol]}")
    try:
        from camserve_server.service.spans import Traces
    except ImportError as error:
        raise ConfigError(f"{endpoint}: traces need more packages: pip install 'camserve[otel]'") from error
    return Traces()


def callers_trace(context: Context) -> str:
    """The id of the trace that the caller says it is in, or ""."""
    for key, value in context.invocation_metadata() or ():
        found = TRACEPARENT.fullmatch(value) if key == "traceparent" and isinstance(value, str) else None
        if found:
            return found[1]
    return ""
