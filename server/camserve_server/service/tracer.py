"""OpenTelemetry traces: a span for each call, and child spans for the phases of its request.

The standard `OTEL_…` environment variables set the endpoint. A span contains no image, label, path or token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
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
from camserve_server import open_inference
from camserve_server.engine.job import Job
from camserve_server.service.call import Call

# Codes of failures on the server's side. Other codes are errors of the caller and do not mark the span as failed.
FAILURES = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
W3C = TraceContextTextMapPropagator()
SERVICES = {
    rpc.name: service.full_name
    for file in (explain_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for rpc in service.methods
} | dict.fromkeys(("ModelInfer", "ModelMetadata", "ModelConfig"), open_inference.SERVICE)
Clock = Callable[[float], int]
LAST_SPANS_S = 5.0  # the server exits after this time even if the collector does not answer


class Tracer:
    """Sends the spans of calls to the endpoint that the environment sets."""

    def __init__(self) -> None:
        attributes = {"service.name": "camserve", "service.version": version("camserve")}
        resource = Resource.create(attributes).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("camserve", version("camserve"))

    def start(self, call: Call) -> str:
        """Start the span of a call, as a child of the caller's span if the metadata name one.

        Returns:
            The identifier of the trace, in hexadecimal.
        """
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
        """End the span of a call and add the spans of its phases.

        Args:
            call: The call.
            code: The name of its gRPC status code.
        """
        span = call.span
        if span is None or not span.is_recording():
            return
        span.set_attribute("camserve.request_id", call.request_id)
        span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
        if call.method:
            span.set_attribute("camserve.method", call.method)
        if code in FAILURES:
            span.set_status(Status(StatusCode.ERROR))
        end, clock = time.monotonic(), _clock()
        if call.job is not None:
            self._add_phases(call, call.job, span, end, clock)
        span.end(clock(end))

    def _add_phases(self, call: Call, job: Job[object], span: Span, end: float, clock: Clock) -> None:
        """Add the spans read, queue, compute (with the first batches) and write, as far as the request got."""
        first, finished = job.first_batch or job.finished or end, job.finished or end
        self._child(span, "read", clock(call.started), clock(job.submitted))
        self._child(span, "queue", clock(job.submitted), clock(first))
        if job.first_batch is None:
            return
        cost: dict[str, AttributeValue] = {
            "camserve.model": job.model.name,
            "camserve.rows": job.rows,
            "camserve.batches": job.batches,
        }
        compute = self._child(span, "compute", clock(first), clock(finished), cost)
        for batch, rows in [*job.batch_records]:
            self._child(
                compute,
                "batch",
                clock(batch.started),
                clock(batch.finished),
                {
                    "camserve.batch": batch.number,
                    "camserve.lane": batch.kind,
                    "camserve.rows": rows,
                    "camserve.batch.rows": batch.rows,
                    "camserve.batch.padding": batch.padding,
                },
            )
        if job.finished is not None:
            self._child(span, "write", clock(job.finished), clock(end))

    def _child(
        self, parent: Span, name: str, start: int, end: int, attributes: Mapping[str, AttributeValue] | None = None
    ) -> Span:
        context = set_span_in_context(parent, Context())
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=start)
        span.end(end)
        return span

    def close(self) -> None:
        """Send the remaining spans; give up after a few seconds."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(LAST_SPANS_S)


def _clock() -> Clock:
    """Return a function that converts times of `time.monotonic()` to nanoseconds since 1970.

    All of its results have one offset. The thread can be preempted while it reads the two clocks; with an offset for
    each time, phases of a request would seem to begin before earlier ones.
    """
    offset = time.time_ns() - int(1e9 * time.monotonic())
    return lambda monotonic: offset + int(1e9 * monotonic)
