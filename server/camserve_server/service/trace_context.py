"""Settings of tracing from the environment, and the trace that a caller names.

This module does not import OpenTelemetry, which is optional; tracer.py does.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from camserve_server.errors import ConfigError
from camserve_server.service.call import Context

if TYPE_CHECKING:  # the tracer imports opentelemetry, an optional dependency
    from camserve_server.service.tracer import Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def tracer_from_environment() -> Tracer | None:
    """Create a tracer from the standard `OTEL_…` environment variables.

    Returns:
        The tracer, or None if no endpoint is set or if tracing is disabled.

    Raises:
        ConfigError: A variable has an unsupported value, or the packages of the extra `otel` are missing.
    """
    endpoint = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    if endpoint is None or off:
        return None
    protocol = next((name for name in PROTOCOLS if os.environ.get(name)), None)
    if protocol and os.environ[protocol] != "grpc":
        raise ConfigError(f"{protocol}: the value is {os.environ[protocol]!r}; expected grpc")
    try:
        from camserve_server.service.tracer import Tracer
    except ImportError as error:
        raise ConfigError(
            f"{endpoint}: tracing needs packages that are not installed; run: pip install 'camserve[otel]'"
        ) from error
    return Tracer()


def trace_id_of_caller(context: Context) -> str:
    """Return the trace identifier that the caller's metadata contain, or an empty string."""
    for key, value in context.invocation_metadata() or ():
        match = TRACEPARENT.fullmatch(value) if key == "traceparent" and isinstance(value, str) else None
        if match:
            return match[1]
    return ""
