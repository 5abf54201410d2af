"""Prometheus metrics of calls, and the listener that serves all metrics. Gauges of the engine are in gauges.py."""

from __future__ import annotations

import threading
import time
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from camserve.addresses import split_host_port
from camserve_server.engine.job import Job
from camserve_server.errors import ConfigError
from camserve_server.service.call import Call

IDLE_S = 10.0  # until the connection of a silent peer is closed, so that it does not keep a thread
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """Counters and histograms of calls, updated when a call or its job ends.

    Attributes:
        registry: The registry of all metrics of the server.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "camserve_requests", "Number of calls that have ended.", ["rpc", "method", "code"], registry=self.registry
        )
        self._duration = self._histogram(
            "camserve_request_duration_seconds", "Seconds from the arrival of a call to its end.", ["rpc", "method"]
        )
        self._queue = self._histogram(
            "camserve_request_queue_seconds", "Seconds from the submission of a request to its first batch.", ["method"]
        )
        self._compute = self._histogram(
            "camserve_request_compute_seconds", "Seconds from the first batch of a request to its result.", ["method"]
        )
        ProcessCollector(registry=self.registry)

    def _histogram(self, name: str, documentation: str, labels: list[str]) -> Histogram:
        return Histogram(name, documentation, labels, buckets=SECONDS, registry=self.registry)

    def ended(self, call: Call, code: str) -> None:
        """Count a call that has ended.

        Args:
            call: The call.
            code: The name of its gRPC status code.
        """
        self._requests.labels(call.rpc, call.method, code).inc()
        self._duration.labels(call.rpc, call.method).observe(time.monotonic() - call.started)

    async def refused(self, rpc: str, code: str) -> None:
        """Count a call that was refused before its request was parsed.

        Args:
            rpc: The name of an existing RPC.
            code: The name of the gRPC status code.
        """
        self._requests.labels(rpc, "", code).inc()

    def finished(self, job: Job[Any], method: str) -> None:
        """Count the times of a job that has ended.

        Args:
            job: The job, whose future is done.
            method: The label of the method.
        """
        self._queue.labels(method).observe(job.queue_ms / 1e3)
        if job.first_batch is not None:
            self._compute.labels(method).observe(job.compute_ms / 1e3)


class Listener:
    """Serves metrics over HTTP on a thread of its own.

    Args:
        metrics: The registry of the metrics.
        address: HOST:PORT; port 0 selects a free port.

    Attributes:
        address: HOST:PORT with the selected port.

    Raises:
        ConfigError: The address cannot be bound.
    """

    def __init__(self, metrics: CollectorRegistry, address: str) -> None:
        host, port = split_host_port(address)
        try:
            self._http: WSGIServer
            self._thread: threading.Thread
            self._http, self._thread = start_http_server(int(port), host, metrics)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"metrics_listen: cannot bind {address}; check that the address belongs to this machine and "
                "that the port is free"
            ) from error
        handler: Any = self._http.RequestHandlerClass
        self._http.RequestHandlerClass = type(handler.__name__, (handler,), {"timeout": IDLE_S})
        self._http.handle_error = _ignore  # type: ignore[method-assign, assignment]  # the default prints a traceback
        self.address = f"{address.rpartition(':')[0]}:{self._http.server_port}"

    def close(self) -> None:
        """Stop the listener."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _ignore(request: Any, peer: Any) -> None:
    """Ignore a peer that sends no request in time or closes its connection early."""
