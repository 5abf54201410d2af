"""The service OpenRcaService (ORCA), whose reports gRPC's policy `weighted_round_robin` reads.

The weight of a server is `rps_fractional / application_utilization`. All reports contain the same rate, so the weights
of the replicas depend only on the time that they need for the rows that they owe.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from camserve_server.service.load_reports.orca_pb2 import LoadReport, LoadReportRequest

SERVICE = "xds.service.orca.v3.OpenRcaService"
# Seconds between two reports. While the load is low, most queues are empty again some tenths of a second later, so that
# rarer reports would mislead clients.
SHORTEST_INTERVAL_S = 0.25
REPORTS_PER_S = 400  # at most, for all clients together, to limit their CPU time
SHARED_S = 0.02  # counting the rows of many requests takes time
MOST_CLIENTS = 4000  # with more, reports would come so rarely that gRPC ignores them
IDLE_S = 0.2  # utilization of an idle server; a smaller one would attract all clients at once

Context = grpc.aio.ServicerContext[Any, Any]


def utilization(seconds_owed: float) -> float:
    """Return the utilization that a server reports.

    Args:
        seconds_owed: The time that the server needs for the rows that it owes.
    """
    return IDLE_S + seconds_owed


class LoadReports:
    """Sends the utilization of this server to its clients. All methods belong to the event loop.

    Args:
        current: Returns the current utilization.
    """

    def __init__(self, current: Callable[[], float]) -> None:
        self._current = current
        self._clients = 0
        self._utilization, self._until = 0.0, 0.0  # of the last moments

    def add_to(self, server: grpc.aio.Server) -> None:
        """Let a gRPC server serve the reports."""
        stream = grpc.unary_stream_rpc_method_handler(
            self.stream,
            request_deserializer=LoadReportRequest.FromString,
            response_serializer=LoadReport.SerializeToString,
        )
        handlers = {"StreamCoreMetrics": stream}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def stream(self, request: LoadReportRequest, context: Context) -> AsyncIterator[LoadReport]:
        """Yield a report now and after each interval. With many clients, the intervals are longer than requested.

        Abort with RESOURCE_EXHAUSTED if `MOST_CLIENTS` read reports already. gRPC tries again later.
        """
        if self._clients == MOST_CLIENTS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MOST_CLIENTS} clients read load reports already; try again later"
            )
        wanted = request.report_interval.seconds + request.report_interval.nanos / 1e9
        self._clients += 1
        try:
            while True:
                yield LoadReport(rps_fractional=1, application_utilization=self._recent())
                await asyncio.sleep(max(wanted, SHORTEST_INTERVAL_S, self._clients / REPORTS_PER_S))
        finally:
            self._clients -= 1

    def _recent(self) -> float:
        """Return the utilization, which all reports of a few milliseconds share."""
        now = time.monotonic()
        if now >= self._until:
            self._utilization, self._until = self._current(), now + SHARED_S
        return self._utilization


async def copy_load(channel: grpc.aio.Channel, load: LoadReport) -> None:
    """Copy the reports of the engine process until it ends.

    Args:
        channel: The link to the engine process.
        load: Receives each report.
    """
    read: grpc.aio.UnaryStreamMultiCallable[LoadReportRequest, LoadReport] = channel.unary_stream(
        f"/{SERVICE}/StreamCoreMetrics", LoadReportRequest.SerializeToString, LoadReport.FromString
    )
    async for report in read(LoadReportRequest()):
        load.CopyFrom(report)
