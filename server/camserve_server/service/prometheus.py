"""What Prometheus is told. The engine counts for itself, and is read when Prometheus asks."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any
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

if TYPE_CHECKING:
    pass

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """Of calls: counted when they end."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "camserve_requests", "Calls that have ended.", ["rpc", "method", "code"], registry=self.registry
        )
        self._duration = self._histogram(
            "camserve_request_duration_seconds", "From a call's arrival to its answer.", ["rpc", "method"]
        )
        self._queue = self._histogram(
            "camserve_request_queue_seconds", "From a request's admission to its first batch.", ["method"]
        )
        self._compute = self._histogram(
            "camserve_request_compute_seconds", "From a request's first batch to its result.", ["method"]
        )
        ProcessCollector(registry=self.registry)

    def _histogram(self, name: str, documentation: str, labels: list[str]) -> Histogram:
        return Histogram(name, documentation, labels, buckets=SECONDS, registry=self.registry)

    def ended(self, call: Call, code: str) -> None:
        """The call is over."""
        self._requests.labels(call.rpc, call.method, code).inc()
        self._duration.labels(call.rpc, call.method).observe(time.monotonic() - call.started)

    def refused(self, rpc: str, code: str) -> None:
        """A call was turned away before it was looked at; `rpc` is one that there is."""
        self._requests.labels(rpc, "", code).inc()

    def finished(self, job: Job[Any], method: str) -> None:
        """The engine is done with a request, whatever came of it."""
        self._queue.labels(method).observe(job.queue_ms / 1e3)
        if job.first_batch is not None:
            self._compute.labels(method).observe(job.compute_ms / 1e3)


class Listener:
    """Answers Prometheus on `address`, HOST:PORT, on a thread of its own. Raises ConfigError where it cannot bind."""

    def __init__(self, metrics: CollectorRegistry, address: str) -> None:
        host, port = split_host_port(address)
        try:
            self._http: WSGIServer
            self._thread: threading.Thread
            self._http, self._thread = start_http_server(int(port), host, metrics)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"metrics_listen: cannot bind {address}; is another server there?") from error
        self.address = f"{address.rpartition(':')[0]}:{self._http.server_port}"

    def close(self) -> None:
        """Answers no more."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
