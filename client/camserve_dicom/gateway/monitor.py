"""HTTP listener for /health and /metrics, in plaintext."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from camserve.addresses import split_host_port
from camserve_dicom.gateway.config import ConfigError
from camserve_dicom.gateway.listener import Listener
from camserve_dicom.gateway.spool import Spool, Stage

__all__ = ["AssociationCollector", "Monitor", "MonitorRequestHandler", "SpoolCollector"]


class SpoolCollector(Collector):
    """Prometheus gauges of the spool, which are read from the disk on each scrape."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def collect(self) -> Iterator[Metric]:
        """Yield the number and age of the entries of each stage, and the free space of the disk."""
        entries = GaugeMetricFamily("camserve_gateway_entries", "Objects in a stage of the spool.", labels=["stage"])
        oldest = GaugeMetricFamily(
            "camserve_gateway_oldest_seconds", "Age of the oldest object in a stage of the spool.", labels=["stage"]
        )
        for stage in Stage:
            times = [changed for _, changed in self._spool.entries_with_times(stage)]
            entries.add_metric([stage.value], len(times))
            oldest.add_metric([stage.value], time.time() - min(times) if times else 0.0)
        yield from (entries, oldest)
        yield GaugeMetricFamily(
            "camserve_gateway_free_bytes", "Free space on the disk of the spool.", self._spool.free_bytes()
        )


class AssociationCollector(Collector):
    """Prometheus metrics of the listener.

    Args:
        listener: Returns the listener, or None before it is open.
    """

    def __init__(self, listener: Callable[[], Listener | None]) -> None:
        self._listener = listener

    def collect(self) -> Iterator[Metric]:
        """Yield the number of established associations, their limit, and the number of rejected ones."""
        listener = self._listener()
        if listener is None:
            return
        yield GaugeMetricFamily(
            "camserve_gateway_associations", "Established associations.", listener.established_associations
        )
        yield GaugeMetricFamily(
            "camserve_gateway_max_associations",
            "Maximum of established associations.",
            listener.max_associations,
        )
        yield CounterMetricFamily(
            "camserve_gateway_rejected_associations",
            "Associations that were rejected because of the maximum.",
            listener.rejected_associations,
        )


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a peer that closed its connection early; the default would print a traceback."""


class MonitorRequestHandler(WSGIRequestHandler):
    """Request handler without an access log.

    Attributes:
        timeout: Seconds until the connection of an idle peer is closed, so that it does not occupy a thread.
    """

    timeout = 10.0

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Do not log the request."""


class Monitor:
    """An HTTP listener that answers from its creation until `close`.

    Args:
        address: HOST:PORT to listen on.
        registry: Metrics of /metrics.
        problems: Returns a text for each condition that keeps the gateway from working.

    Raises:
        ConfigError: If the address is not available.

    Attributes:
        address: HOST:PORT with the actual port.
    """

    def __init__(self, address: str, registry: CollectorRegistry, problems: Callable[[], list[str]]) -> None:
        self._metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)
        self._problems = problems
        host, port = split_host_port(address)
        try:
            self._http = make_server(host, int(port), self._answer, _ThreadingServer, MonitorRequestHandler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"monitor_listen: cannot bind {address}; choose a free address of this "
                "machine, or stop the process that uses it"
            ) from error
        self.address = f"{address.rpartition(':')[0]}:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, name="monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the listener and wait for its thread."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        try:
            match environ["PATH_INFO"]:
                case "/metrics":
                    return self._metrics(environ, start_response)
                case "/health":
                    problems = self._problems()
                    status = "503 Service Unavailable" if problems else "200 OK"
                    body = {"status": "not serving" if problems else "serving", "wrong": problems}
                case _:
                    status, body = "404 Not Found", {"paths": ["/health", "/metrics"]}
        except OSError:  # wsgiref would print a traceback with paths
            status, body = "503 Service Unavailable", {"status": "not serving", "wrong": ["the spool cannot be read"]}
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(body).encode()]
