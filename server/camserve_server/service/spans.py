"""OpenTelemetry: a span for each call, below the caller's own, and spans of what it went through.

The standard `OTEL_…` environment variables say where traces go. No image, label, path or token stands in a span.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from importlib.metadata import version

import grpc
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from camserve.v1 import admin_pb2, explain_pb2
from camserve_server.engine.job import Job
from camserve_server.service.call import Call

# Codes that are the server's fault; others are the caller's.
FAILURES = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
W3C = TraceContextTextMapPropagator()
SERVICES = {
    rpc.name: service.full_name
    for file in (explain_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for rpc in service.methods
}
LAST_SPANS_S = 5.0  # where nobody takes them, the server ends all the same


class Traces:
    """Sends spans to the endpoint that the environment names."""

    def __init__(self) -> None:
        named = {"service.name": "camserve", "service.version": version("camserve")}
        resource = Resource.create(named).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("camserve", version("camserve"))

    def start(self, call: Call) -> str:
        """Begins the call's span, below that of its caller if the metadata has one. Returns the trace's id."""
        service = SERVICES[call.rpc]
        metadata = {key: str(value) for key, value in call.context.invocation_metadata() or ()}
        call.span = self._tracer.start_span(
            f"{service}/{call.rpc}",
            W3C.extract(metadata, Context()),
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": call.rpc},
        )
        return f"{call.span.get_span_context().trace_id:032x}"

    def end(self, call: Call, code: str) -> None:
        """Ends the call's span, with those of what it went through."""
        span = call.span
        if span is None or not span.is_recording():
            return
        span.set_attribute("camserve.request_id", call.request_id)
        span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
        if call.method:
            span.set_attribute("camserve.method", call.method)
        if code in FAILURES:
            span.set_status(Status(StatusCode.ERROR))
        end = time.monotonic()
        if call.job is not None:
            self._went_through(call, call.job, span, end)
        span.end(_clock(end))

    def _went_through(self, call: Call, job: Job[object], span: Span, end: float) -> None:
        """Reading, queueing, computing with the first batches, and writing, as far as the request came."""
        first, finished = job.first_batch or job.finished or end, job.finished or end
        self._child(span, "read", call.started, job.submitted)
        self._child(span, "queue", job.submitted, first)
        if job.first_batch is None:
            return
        facts: dict[str, AttributeValue] = {
            "camserve.model": job.model.name,
            "camserve.rows": job.rows,
            "camserve.batches": job.batches,
        }
        compute = self._child(span, "compute", first, finished, facts)
        for ran, rows in [*job.ran]:
            self._child(
                compute,
                "batch",
                ran.started,
                ran.finished,
                {
                    "camserve.batch": ran.number,
                    "camserve.lane": ran.kind,
                    "camserve.rows": rows,
                    "camserve.batch.rows": ran.rows,
                    "camserve.batch.padding": ran.padding,
                },
            )
        if job.finished is not None:
            self._child(span, "write", job.finished, end)

    def _child(
        self, parent: Span, name: str, start: float, end: float, facts: Mapping[str, AttributeValue] | None = None
    ) -> Span:
        below = set_span_in_context(parent, Context())
        span = self._tracer.start_span(name, below, attributes=facts, start_time=_clock(start))
        span.end(_clock(end))
        return span

    def close(self) -> None:
        """Sends what is not yet sent, as far as that goes quickly."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(LAST_SPANS_S)


def _clock(monotonic: float) -> int:
    """The time of `time.monotonic()` in nanoseconds since 1970."""
    return time.time_ns() - int(1e9 * (time.monotonic() - monotonic))
