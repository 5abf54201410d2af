"""The server: bind the listeners, load the models, serve, and shut down."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc

from camserve.v1 import admin_pb2_grpc
from camserve_server import registry
from camserve_server.config import Config
from camserve_server.engines import Engines
from camserve_server.errors import CamserveError, ConfigError
from camserve_server.model_pool import ModelPool
from camserve_server.models.model import Model
from camserve_server.service.admin import AdminServicer
from camserve_server.service.bounds import SizeLimits
from camserve_server.service.frontends.supervisor import FrontEnds
from camserve_server.service.gauges import Gauges
from camserve_server.service.health import Health
from camserve_server.service.listeners import (
    EXCLUSIVE_PORT,
    KEEPALIVE,
    NOT_SERVING,
    SERVING,
    STOP_GRACE_S,
    OwnPort,
    bind,
    callers_server,
    services,
)
from camserve_server.service.load_reports.reports import LoadReports, utilization
from camserve_server.service.prometheus import Listener, Metrics
from camserve_server.service.result_cache.cache import ResultCache
from camserve_server.service.result_cache.key import Keys
from camserve_server.service.security import Guard
from camserve_server.service.servicer import Servicer
from camserve_server.service.trace_context import tracer_from_environment
from camserve_server.torch_setup.allocator import keep_memory
from camserve_server.torch_setup.device import pick_device

if TYPE_CHECKING:  # importing the stubs would register their messages: see open_inference
    from camserve_server.service.inference.servicer import InferenceServicer

log = structlog.get_logger()


class Server:
    """A gRPC server with its engines.

    Args:
        config: The configuration.
        interceptors: Interceptors of calls that run before those of the server. They need a single front end.

    Attributes:
        config: The configuration.
        engines: Run the plans of all requests.
        engine: The engine of the first device.
        address: HOST:PORT of the server, with the selected port, or its Unix socket.
        health_address: The address of the listener for probes; empty if there is none.
        admin_address: The address of the listener for operators; empty if there is none.
        metrics_address: The address of the listener for Prometheus; empty if there is none.
    """

    def __init__(self, config: Config, *, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> None:
        self.config = config
        self.engines = Engines(config)
        self.engine = self.engines.local[0]
        self.address = ""
        self.health_address = ""
        self.admin_address = ""
        self.metrics_address = ""
        self._metrics, self._tracer = Metrics(), tracer_from_environment()
        self._servicer = Servicer(config, self._metrics, self._tracer)
        self._metrics_listener: Listener | None = None
        self._health = Health()
        inference = _inference(self._servicer, self._health) if config.open_inference else None
        loads = LoadReports(lambda: utilization(self.engines.seconds_owed()))
        self._callers: OwnPort | FrontEnds = (
            OwnPort(
                callers_server(
                    config,
                    self._servicer,
                    self._health,
                    self._metrics.refused,
                    inference,
                    loads,
                    interceptors=interceptors,
                ),
                config,
            )
            if config.frontends == 1
            else FrontEnds(config, self._servicer, self._health, self._metrics, inference, loads)
        )
        front_ends = self._callers if isinstance(self._callers, FrontEnds) else None
        self._metrics.registry.register(Gauges(self._servicer, self.engines, front_ends))
        self._probes = grpc.aio.server(options=[EXCLUSIVE_PORT, *KEEPALIVE])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probes)
        self._admin = grpc.aio.server(
            interceptors=[Guard(config, self._metrics.refused), SizeLimits()], options=[EXCLUSIVE_PORT, *KEEPALIVE]
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(self._servicer), self._admin)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._admin)
        loads.add_to(self._admin)  # without them, gRPC would write a line to the stderr of operators

    async def start(self) -> None:
        """Bind the listeners, serve Health, load the models, and then serve everything.

        Raises:
            ConfigError: An address cannot be bound, or a model cannot be loaded.
            CamserveError: A model does not fit into the device's memory.
        """
        mode = self.config.socket_mode
        self.address = self._callers.bind()
        self._health.set("", SERVING)
        self._set_states(NOT_SERVING)
        loop = asyncio.get_running_loop()
        self.engines.on_device_failure = lambda device: _call_soon(loop, self._health.set, device, NOT_SERVING)
        if self.config.health_listen is not None:
            self.health_address = bind(self._probes, "health_listen", self.config.health_listen, socket_mode=mode)
            await self._probes.start()
        if self.config.metrics_listen is not None:
            self._metrics_listener = Listener(self._metrics.registry, self.config.metrics_listen)
            self.metrics_address = self._metrics_listener.address
        if self.config.admin_listen is not None:
            self.admin_address = bind(
                self._admin, "admin_listen", self.config.admin_listen, self.config.tls, socket_mode=mode
            )
        await self._callers.start()
        registry.discover()
        self.engines.start()
        if self.config.cache is not None:
            self._servicer.cache = ResultCache(
                self.config.cache,
                Keys(self.config, pick_device(self.config.device)),
                self._servicer.codec,
                certificates=self.config.tls is not None and self.config.tls.client_ca is not None,
            )
        models = ModelPool(self.config, self.engines)
        await models.load_all()
        self._servicer.models = models
        if self.config.admin_listen is not None:
            await self._admin.start()
        self._set_states(SERVING)
        await self._callers.ready()
        log.info("ready", address=self.address, models=[*self.models], methods=sorted(registry.METHODS))

    @property
    def models(self) -> dict[str, Model]:
        """The loaded models by their name. Raises Unavailable before the end of `start`."""
        return {config.name: model for config, _, model in self._servicer.loaded_models().all() if model}

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, wait for running ones, fail the remaining ones, and stop.

        Args:
            grace_s: The most seconds that running calls may take.
        """
        self._set_states(NOT_SERVING)
        # The port stays open meanwhile, so that new calls receive an error with a retry delay.
        await self._servicer.drain(grace_s)
        await asyncio.to_thread(self.engines.close)
        await asyncio.gather(self._callers.stop(), *(each.stop(STOP_GRACE_S) for each in (self._probes, self._admin)))
        if self._servicer.cache is not None:
            await self._servicer.cache.close()
        for part in (self._metrics_listener, self._tracer):
            if part is not None:
                await asyncio.to_thread(part.close)

    def _set_states(self, state: int) -> None:
        """Set the state of all services. With several devices, Health has a service with the name of each."""
        for service in services(self.config):
            self._health.set(service, state)
        if self.engines.several_devices:
            for engine in self.engines.local:
                self._health.set(engine.device, state if engine.working else NOT_SERVING)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Call a function on an event loop, unless the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def _inference(servicer: Servicer, health: Health) -> InferenceServicer:
    """Return the servicer of the Open Inference Protocol. Raises ConfigError."""
    try:
        from camserve_server.service.inference.servicer import InferenceServicer
    except TypeError as error:
        raise ConfigError(
            "open_inference: another package of this process, such as tritonclient or kserve, has registered the "
            "messages of the Open Inference Protocol; set open_inference = false"
        ) from error
    return InferenceServicer(servicer, health)


async def run(config: Config, ready: Callable[[Server], None]) -> int:
    """Run a server until SIGINT or SIGTERM, then drain it. A second signal ends the process at once.

    Args:
        config: The configuration.
        ready: Is called once when the server accepts requests.

    Returns:
        The exit status: 0 after a signal, 1 if the engine failed.

    Raises:
        ConfigError: The server cannot start.
    """
    if pick_device(config.device).type == "cpu":
        keep_memory()
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    server = Server(config)
    starting = asyncio.create_task(server.start())

    def stop() -> None:
        for number in signals:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        stopping.set()
        starting.cancel()  # without effect after the start

    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        await starting
    except asyncio.CancelledError:
        await server.stop(0)
        return 0
    except (CamserveError, ConfigError) as error:
        await server.stop(0)
        raise ConfigError(str(error)) from error
    ready(server)
    server.engines.failed.add_done_callback(lambda _: loop.call_soon_threadsafe(stopping.set))
    await stopping.wait()
    if server.engines.failed.done():
        log.error("the engine's thread failed; the server ends")
        await server.stop(0)
        return 1
    log.info("draining", grace_s=config.grace_s)
    await server.stop(config.grace_s)
    return 0
