"""Load reports of a real server, and their effect on the calls of a real client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

import camserve
from camserve_server.config import Config, ModelConfig
from camserve_server.service.load_reports import reports
from camserve_server.service.load_reports.orca_pb2 import LoadReport, LoadReportRequest
from camserve_server.service.load_reports.reports import IDLE_S, SHORTEST_INTERVAL_S, LoadReports
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.e2e.engines import engine_of, wait_until, wait_until_idle
from tests.processes import LIMIT_S, patient_client

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
LIMITS: dict[str, Any] = {
    "listen": "127.0.0.1:0",
    "models": [ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)],
}


@contextmanager
def reported(address: str) -> Iterator[Iterator[LoadReport]]:
    """Yield the reports of a server."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_stream(
            f"/{reports.SERVICE}/StreamCoreMetrics",
            request_serializer=LoadReportRequest.SerializeToString,
            response_deserializer=LoadReport.FromString,
        )(LoadReportRequest(), timeout=LIMIT_S)
        yield call
        call.cancel()


@contextmanager
def busy(server: Server, method: str = "opti-cam", **parameters: int) -> Iterator[None]:
    """Let the server work on a request that takes longer than the test."""
    parameters = parameters or {"steps": 10_000}
    with patient_client(server.address) as client:
        stream = client.explain_stream(IMAGE, method=method, parameters=parameters)
        next(event for event in stream if getattr(event, "rows_done", 0))
        try:
            yield
        finally:
            stream.close()
    wait_until_idle(server)


@pytest.mark.parametrize("frontends", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_utilization_grows_with_the_time_that_the_owed_rows_need(frontends: int) -> None:
    with serving(Config(**LIMITS, frontends=frontends)) as server, reported(server.address) as stream:
        assert next(each for each in stream if each.application_utilization).application_utilization == IDLE_S
        with busy(server):
            next(each for each in stream if each.application_utilization > 1)
            # The rate of the engine is an average of its first batches, so it may double until the next look.
            wait_until(
                lambda: (
                    next(stream).application_utilization
                    == pytest.approx(IDLE_S + engine_of(server).seconds_owed(), rel=0.1)
                )
            )
        last = next(each for each in stream if each.application_utilization == IDLE_S)
    assert last.rps_fractional == 1


def test_clients_of_operators_get_reports_too() -> None:
    """Otherwise gRPC would write a line to the stderr of `camserve admin`."""
    with serving(Config(**LIMITS, admin_listen="127.0.0.1:0")) as server, reported(server.admin_address) as stream:
        assert next(stream).application_utilization == IDLE_S


def rows(server: Server) -> int:
    """Return the rows of all batches that a server has run."""
    return sum(counted.rows for counted in server.engines.lanes().values())


def test_client_prefers_the_server_that_owes_less() -> None:
    """Ten calls in a row, most of which an idle server receives. Round robin would give it half of them."""
    with ExitStack() as stack:
        loaded, idle = (stack.enter_context(serving(Config(**LIMITS))) for _ in range(2))
        client = stack.enter_context(patient_client(f"ipv4:{loaded.address},{idle.address}"))
        stack.enter_context(busy(loaded, "rise", masks=1_000_000))

        def most_calls_reach_the_idle_server() -> bool:
            before = rows(idle)
            cost = [client.explain(IMAGE, method="grad-cam").cost.rows for _ in range(10)]
            return rows(idle) - before >= 0.8 * sum(cost)

        wait_until(most_calls_reach_the_idle_server)


@pytest.mark.parametrize(
    ("requested_s", "clients", "interval_s"),
    [
        (0, 1, SHORTEST_INTERVAL_S),
        (-5, 1, SHORTEST_INTERVAL_S),
        (0.01, 1, SHORTEST_INTERVAL_S),
        (2.5, 1, 2.5),
        (0, 1000, 2.5),
    ],
)
def test_interval_is_as_requested_within_limits(
    requested_s: float, clients: int, interval_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def read() -> None:
        loads = LoadReports(lambda: IDLE_S)
        request = LoadReportRequest(report_interval=Duration())
        request.report_interval.FromNanoseconds(int(requested_s * 1e9))
        context: Any = None
        streams: list[AsyncIterator[LoadReport]] = [loads.stream(request, context) for _ in range(clients)]
        for _ in range(2):
            for stream in streams:
                await anext(stream)
        assert waits[-1] == interval_s
        for stream in streams[1:]:
            await stream.aclose()  # type: ignore[attr-defined]
        await anext(streams[0])
        assert waits[-1] == max(requested_s, SHORTEST_INTERVAL_S)

    monkeypatch.setattr(reports, "asyncio", SimpleNamespace(sleep=sleep))  # servers of other tests sleep, too
    asyncio.run(read())


def test_client_without_health_checks_reads_no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that does not forward Health probably does not forward load reports."""
    asked: list[int] = []
    stream = LoadReports.stream

    def counted(self: LoadReports, request: LoadReportRequest, context: reports.Context) -> AsyncIterator[LoadReport]:
        asked.append(request.report_interval.nanos)
        return stream(self, request, context)

    monkeypatch.setattr(LoadReports, "stream", counted)
    with serving(Config(**LIMITS)) as server:
        with camserve.Client(server.address, health_checks=False) as client:
            client.explain(IMAGE, method="grad-cam")
        assert not asked
        with camserve.Client(server.address) as client:
            client.explain(IMAGE, method="grad-cam")
            wait_until(lambda: asked)
    assert asked[0] == 0.25e9


def test_number_of_clients_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports need no token, so anybody could open any number of streams."""
    monkeypatch.setattr(reports, "MOST_CLIENTS", 2)
    with serving(Config(**LIMITS)) as server, ExitStack() as stack:
        first, second = (stack.enter_context(reported(server.address)) for _ in range(2))
        assert next(first) and next(second)
        with pytest.raises(grpc.RpcError) as refused, reported(server.address) as third:
            next(third)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()  # type: ignore[attr-defined]

        def accepted() -> bool:
            with reported(server.address) as again:
                try:
                    return bool(next(again))
                except grpc.RpcError:
                    return False

        wait_until(accepted)
