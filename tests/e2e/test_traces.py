"""Exported traces, from the span of a caller to the batches of the engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import skimage.data
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider

import camserve
from camserve_server.config import Config, ModelConfig
from camserve_server.errors import ConfigError
from camserve_server.service import tracer
from camserve_server.service.trace_context import tracer_from_environment
from tests.conftest import serving
from tests.e2e.engines import wait_until
from tests.processes import LIMIT_S, patient_client
from tests.support import full_batches

CAT = skimage.data.chelsea()
SECONDS = 1e-9
TINY = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps the exported spans."""

    def __init__(self) -> None:
        self.resources: list[dict[str, Any]] = []
        self.spans: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:
        for each in request.resource_spans:
            self.resources.append(attributes(each.resource))
            self.spans += [span for scope in each.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, request_id: str) -> dict[str, list[Any]]:
        """Wait for the span of the call, which comes last, and return all spans of its trace by name."""
        found: list[Any] = []

        def complete() -> bool:
            found[:] = [span for span in self.spans if attributes(span).get("camserve.request_id") == request_id]
            return bool(found)

        wait_until(complete)
        inside = [span for span in self.spans if span.trace_id == found[0].trace_id]
        return {name: [span for span in inside if span.name == name] for name in {span.name for span in inside}}


def attributes(of: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}


@pytest.fixture(autouse=True)
def _exporters_end() -> Iterator[None]:
    """Wait until the test has left no thread of OpenTelemetry. It would draw random numbers during later tests."""
    before = threading.enumerate()
    yield
    wait_until(lambda: not [new for new in {*threading.enumerate()} - {*before} if new.name.startswith("Otel")])


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Run a collector and set its address in the environment."""
    found, receiver = Collector(), grpc.server(ThreadPoolExecutor(2))
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(found, receiver)
    port = receiver.add_insecure_port("127.0.0.1:0")
    receiver.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield found
    receiver.stop(None).wait()


@pytest.fixture(scope="module")
def client(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[camserve.Client]:
    """Yield a client of a server with a small model that has labels."""
    labels = tmp_path_factory.mktemp("labels") / "labels.txt"
    labels.write_text("\n".join("abcdefg"))
    model = TINY.model_copy(update={"labels": str(labels)})
    with (
        full_batches(),
        serving(Config(listen="127.0.0.1:0", models=[model])) as server,
        patient_client(server.address) as client,
    ):
        yield client


@pytest.mark.slow
def test_a_request_is_traced_from_the_caller_to_the_batch(collector: Collector, client: camserve.Client) -> None:
    callers_tracer = TracerProvider(shutdown_on_exit=False).get_tracer("caller")
    with callers_tracer.start_as_current_span("caller") as caller:
        cost = client.explain(CAT, method="score-cam", request_id="traced").cost
    spans = collector.of("traced")
    [server] = spans["camserve.v1.ExplainService/ExplainStream"]
    assert server.trace_id == caller.get_span_context().trace_id.to_bytes(16, "big")
    assert server.parent_span_id == caller.get_span_context().span_id.to_bytes(8, "big")
    assert server.kind == server.SPAN_KIND_SERVER
    assert attributes(server) == {
        "rpc.system": "grpc",
        "rpc.service": "camserve.v1.ExplainService",
        "rpc.method": "ExplainStream",
        "rpc.grpc.status_code": 0,
        "camserve.request_id": "traced",
        "camserve.method": "score-cam",
    }
    parts = [spans[name][0] for name in ("read", "queue", "compute", "write")]
    assert all(part.parent_span_id == server.span_id for part in parts)
    starts, ends = ([getattr(part, f"{side}_time_unix_nano") for part in parts] for side in ("start", "end"))
    # The parts of a request follow each other without a pause, until the end of the call.
    assert starts[1:] == ends[:-1]
    assert ends[-1] == server.end_time_unix_nano
    assert starts == sorted(starts)
    # The start of the call comes from another clock, and the process can be preempted before it is read.
    slack = max(100_000_000, (server.end_time_unix_nano - server.start_time_unix_nano) // 2)
    assert abs(starts[0] - server.start_time_unix_nano) < slack
    compute = parts[2]
    assert attributes(compute) == {
        "camserve.model": "tiny",
        "camserve.rows": cost.rows,
        "camserve.batches": cost.batches,
    }
    assert SECONDS * (compute.end_time_unix_nano - compute.start_time_unix_nano) == pytest.approx(
        1e-3 * cost.compute_ms, abs=0.05, rel=0.1
    )
    batches = spans["batch"]
    assert len(batches) == min(16, cost.batches)
    assert all(batch.parent_span_id == compute.span_id for batch in batches)
    facts = [attributes(batch) for batch in batches]
    assert all(each["camserve.batch.rows"] + each["camserve.batch.padding"] == 4 for each in facts)
    numbers = [each["camserve.batch"] for each in facts]
    assert numbers == [*range(numbers[0], numbers[0] + len(numbers))]


def test_trace_of_a_long_request_contains_sixteen_batches(collector: Collector, client: camserve.Client) -> None:
    cost = client.explain(CAT, method="opti-cam", parameters={"steps": 40}, request_id="long").cost
    spans = collector.of("long")
    assert cost.batches > 16 == len(spans["batch"])
    assert attributes(spans["compute"][0])["camserve.batches"] == cost.batches


def test_traces_of_failures_contain_no_message(
    collector: Collector, client: camserve.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a cancellation at the deadline counts as late.
    monkeypatch.setattr("camserve_server.service.call.EXPIRED_SHARE", 1.0)
    with pytest.raises(camserve.InvalidArgument, match="secret-label"):
        client.explain(CAT, method="grad-cam", target="secret-label", request_id="failed")
    minutes = {"sensitivity-max": {"samples": 1000}}  # on any machine
    with pytest.raises(camserve.DeadlineExceeded):
        client.explain(CAT, method="rise", metrics=minutes, timeout=5, request_id="late")
    [failed] = collector.of("failed")["camserve.v1.ExplainService/ExplainStream"]
    [late] = collector.of("late")["camserve.v1.ExplainService/Explain"]
    assert attributes(failed)["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert failed.status.code == failed.status.STATUS_CODE_UNSET, "the caller made the error"
    assert late.status.code == late.status.STATUS_CODE_ERROR
    assert "compute" not in collector.of("failed")
    assert "secret" not in str(collector.spans)


def test_unsampled_request_is_not_traced(collector: Collector, client: camserve.Client) -> None:
    ignored = trace.SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=trace.TraceFlags(0))
    with trace.use_span(trace.NonRecordingSpan(ignored)):
        client.explain(CAT, method="grad-cam", request_id="ignored")
    client.explain(CAT, method="grad-cam", request_id="after")
    collector.of("after")
    assert not [span for span in collector.spans if span.trace_id == (0xABC).to_bytes(16, "big")]


@pytest.mark.slow
def test_service_name_comes_from_the_environment(
    collector: Collector, client: camserve.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.explain(CAT, method="grad-cam", request_id="named")
    collector.of("named")
    assert collector.resources[-1]["service.name"] == "camserve"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "explanations")
    with serving(Config(listen="127.0.0.1:0", models=[TINY])) as other, patient_client(other.address) as client:
        client.explain(CAT, method="grad-cam", request_id="elsewhere")
    assert collector.of("elsewhere"), "the server sends pending spans when it stops"
    assert collector.resources[-1]["service.name"] == "explanations"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_traces_are_off_by_default_and_can_be_disabled(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracer_from_environment() is None


def test_protocols_other_than_grpc_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL"):
        tracer_from_environment()


@pytest.mark.slow
def test_unreachable_collector_does_not_delay_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(tracer, "LAST_SPANS_S", 0.1)
    with serving(Config(listen="127.0.0.1:0", models=[TINY])) as server, patient_client(server.address) as client:
        assert client.explain(CAT, method="grad-cam").cost.rows == 2


@pytest.mark.slow
def test_collector_that_never_answers_does_not_delay_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()
    shutdown = TracerProvider.shutdown

    def late_shutdown(provider: TracerProvider) -> None:
        stopped.wait(2 * LIMIT_S)
        shutdown(provider)

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(tracer, "LAST_SPANS_S", 0.1)
    monkeypatch.setattr(TracerProvider, "shutdown", late_shutdown)
    try:
        with serving(Config(listen="127.0.0.1:0", models=[TINY])) as server, patient_client(server.address) as client:
            client.explain(CAT, method="grad-cam")
    finally:
        stopped.set()
