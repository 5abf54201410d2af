"""What watches the gateway is answered: /health and /metrics, on one plaintext listener."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from camserve.addresses import split_host_port
from camserve_dicom.gateway.config import ConfigError
from camserve_dicom.gateway.spool import Spool, Stage

__all__ = ["Gauges", "Monitor"]


class Gauges(Collector):
    """Of the spool: read from it when Prometheus asks."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def collect(self) -> Iterator[Metric]:
        """As Prometheus wants it."""
        entries = GaugeMetricFamily("camserve_gateway_entries", "Objects in a stage of the spool.", labels=["stage"])
        oldest = GaugeMetricFamily("camserve_gateway_oldest_seconds", "Age of the oldest of them.", labels=["stage"])
        for stage in Stage:
            since = [since for _, since in self._spool.changed(stage)]
            entries.add_metric([stage.value], len(since))
            oldest.add_metric([stage.value], time.time() - min(since) if since else 0.0)
        yield from (entries, oldest)
        yield GaugeMetricFamily("camserve_gateway_free_bytes", "On the spool's disk.", self._spool.free_bytes())


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    timeout = 10.0  # nobody keeps a thread by saying nothing

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


class Monitor:
    """Listens on `address` until closed. `wrong` says what keeps the gateway from working. Raises ConfigError."""

    def __init__(self, address: str, registry: CollectorRegistry, wrong: Callable[[], list[str]]) -> None:
        self._metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)
        self._wrong = wrong
        host, port = split_host_port(address)
        try:
            self._http = make_server(host, int(port), self._answer, _Server, _Quiet)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"monitor_listen: cannot bind {address}; is another gateway there?") from error
        self.address = f"{address.rpartition(':')[0]}:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, name="monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answers no more."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        try:
            match environ["PATH_INFO"]:
                case "/metrics":
                    return self._metrics(environ, start_response)
                case "/health":
                    wrong = self._wrong()
                    status = "503 Service Unavailable" if wrong else "200 OK"
                    body = {"status": "not serving" if wrong else "serving", "wrong": wrong}
                case _:
                    status, body = "404 Not Found", {"paths": ["/health", "/metrics"]}
        except OSError:  # of which wsgiref would print paths
            status, body = "503 Service Unavailable", {"status": "not serving", "wrong": ["the spool cannot be read"]}
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(body).encode()]
