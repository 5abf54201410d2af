"""The server's life: bind, load, warm, serve, drain."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence

import grpc
import structlog
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection

from camserve.v1 import admin_pb2_grpc, explain_pb2, explain_pb2_grpc
from camserve_server import registry
from camserve_server.config import Config, TLSConfig
from camserve_server.engine.engine import Engine
from camserve_server.errors import CamserveError, ConfigError
from camserve_server.model_pool import ModelPool
from camserve_server.models.model import Model
from camserve_server.service.admin import AdminServicer
from camserve_server.service.bounds import Bounds
from camserve_server.service.gauges import Gauges
from camserve_server.service.health import Health
from camserve_server.service.prometheus import Listener, Metrics
from camserve_server.service.security import Guard
from camserve_server.service.servicer import Servicer
from camserve_server.service.tls import credentials
from camserve_server.service.trace_context import tracer_from_environment
from camserve_server.torch_setup.allocator import keep_memory
from camserve_server.torch_setup.device import pick_device

SERVICE = explain_pb2.DESCRIPTOR.services_by_name["ExplainService"].full_name
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ONE_A_PORT = ("grpc.so_reuseport", 0)  # a second server on the port is an error, not a lottery
KEEPALIVE = (  # clients ping every 30 s; by default gRPC would hang up on who does so more than every five minutes
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # And we them: who has vanished without a word shall not be waited for.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
)
# Clients look for new replicas when they connect; what runs on an old connection is finished on it.
CONNECTION_AGE = ("grpc.max_connection_age_ms", 600_000)
LAST_WORDS_S = 0.5  # for answers on their way; those who watch Health would stay for ever

log = structlog.get_logger()


class Server:
    """One gRPC server in front of one engine."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine = Engine(max_rows_owed=config.max_rows_owed, batch_invariant=config.batch_invariant)
        self.address = ""
        self.health_address = ""  # of the listener for probes, if there is one
        self.admin_address = ""  # of the listener for operators, if there is one
        self.metrics_address = ""  # of the listener for Prometheus, if there is one
        self._metrics, self._tracer = Metrics(), tracer_from_environment()
        self._servicer = Servicer(config, self.engine, self._metrics, self._tracer)
        self._metrics.registry.register(Gauges(self._servicer, self.engine))
        self._metrics_listener: Listener | None = None
        self._health = Health()
        self._grpc = grpc.aio.server(
            interceptors=[Guard(config, self._metrics), Bounds()],
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ONE_A_PORT,
                *KEEPALIVE,
                CONNECTION_AGE,
            ],
        )
        explain_pb2_grpc.add_ExplainServiceServicer_to_server(self._servicer, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if config.reflection:
            reflection.enable_server_reflection([SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME], self._grpc)
        self._probes = grpc.aio.server(options=[ONE_A_PORT])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probes)
        self._admin = grpc.aio.server(
            interceptors=[Guard(config, self._metrics), Bounds()], options=[ONE_A_PORT, *KEEPALIVE]
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(self._servicer), self._admin)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._admin)

    async def start(self) -> None:
        """Binds, answers Health, loads and warms the models, then is ready. Raises ConfigError."""
        self.address = _bind(self._grpc, "listen", self.config.listen, self.config.tls)
        self._health.set("", SERVING)
        self._health.set(SERVICE, NOT_SERVING)
        if self.config.health_listen is not None:
            self.health_address = _bind(self._probes, "health_listen", self.config.health_listen)
            await self._probes.start()
        if self.config.metrics_listen is not None:
            self._metrics_listener = Listener(self._metrics.registry, self.config.metrics_listen)
            self.metrics_address = self._metrics_listener.address
        if self.config.admin_listen is not None:
            self.admin_address = _bind(self._admin, "admin_listen", self.config.admin_listen, self.config.tls)
        await self._grpc.start()
        device = pick_device(self.config.device)
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        registry.discover()
        self.engine.start()
        models = ModelPool(self.config, self.engine, device)
        await models.load_all()
        self._servicer.models = models
        if self.config.admin_listen is not None:
            await self._admin.start()
        self._health.set(SERVICE, SERVING)
        log.info("ready", address=self.address, models=[*self.models], methods=sorted(registry.METHODS))

    @property
    def models(self) -> dict[str, Model]:
        """Those that are loaded."""
        return {config.name: model for config, _, model in self._servicer.loaded_models().all() if model}

    async def stop(self, grace_s: float) -> None:
        """Is not ready, refuses new work, finishes what runs within `grace_s` seconds, fails the rest."""
        self._health.set(SERVICE, NOT_SERVING)
        # The port stays open meanwhile: whoever calls now is told when to try again.
        await self._servicer.drain(grace_s)
        await asyncio.to_thread(self.engine.close)
        await asyncio.gather(*(each.stop(LAST_WORDS_S) for each in (self._grpc, self._probes, self._admin)))
        for last in (self._metrics_listener, self._tracer):
            if last is not None:
                await asyncio.to_thread(last.close)


def _bind(server: grpc.aio.Server, key: str, address: str, tls: TLSConfig | None = None) -> str:
    """Makes the server listen there; returns where, with the port. Raises ConfigError, naming the key."""
    host = address.rpartition(":")[0]
    try:
        port = server.add_secure_port(address, credentials(tls)) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"{key}: cannot bind {address}; is another server there?") from error
    return f"{host}:{port}"


async def run(config: Config, ready: Callable[[Server], None]) -> int:
    """Serves until SIGINT or SIGTERM, then drains; a second signal ends at once. Returns the exit status."""
    if pick_device(config.device).type == "cpu":
        keep_memory()
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    server = Server(config)
    starting = asyncio.create_task(server.start())
    _on(loop, signals, starting.cancel)
    try:
        await starting
    except asyncio.CancelledError:
        await server.stop(0)
        return 0
    except (CamserveError, ConfigError) as error:
        await server.stop(0)
        raise ConfigError(str(error)) from error
    _on(loop, signals, stopping.set)
    ready(server)
    server.engine.died.add_done_callback(lambda _: loop.call_soon_threadsafe(stopping.set))
    await stopping.wait()
    if server.engine.died.done():
        log.error("the engine died; the server ends")
        await server.stop(0)
        return 1
    for number in signals:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    log.info("draining", grace_s=config.grace_s)
    await server.stop(config.grace_s)
    return 0


def _on(loop: asyncio.AbstractEventLoop, signals: Sequence[signal.Signals], do: Callable[[], object]) -> None:
    for number in signals:
        loop.add_signal_handler(number, do)
