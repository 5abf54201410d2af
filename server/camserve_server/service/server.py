"""The server's life: bind, load, warm, serve, drain."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import structlog
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from camserve.v1 import explain_pb2, explain_pb2_grpc
from camserve_server import registry
from camserve_server.allocator import keep_memory
from camserve_server.config import Config
from camserve_server.engine import Engine
from camserve_server.errors import ConfigError
from camserve_server.models.load import load
from camserve_server.models.model import Model
from camserve_server.service.servicer import Servicer
from camserve_server.warmup import warm_up

SERVICE = explain_pb2.DESCRIPTOR.services_by_name["ExplainService"].full_name
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

log = structlog.get_logger()


class Server:
    """One gRPC server in front of one engine."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine: Engine | None = None
        self.address = ""
        self._servicer = Servicer(config)
        self._health = health.aio.HealthServicer()
        self._grpc = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
            ]
        )
        explain_pb2_grpc.add_ExplainServiceServicer_to_server(self._servicer, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection([SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], self._grpc)

    async def start(self) -> None:
        """Binds, answers Health, loads and warms the models, then is ready. Raises ConfigError."""
        host, _, _ = self.config.listen.rpartition(":")
        try:
            port = self._grpc.add_insecure_port(self.config.listen)
        except RuntimeError as error:
            raise ConfigError(f"listen: cannot bind {self.config.listen}; is another server there?") from error
        self.address = f"{host}:{port}"
        await self._health.set("", SERVING)
        await self._health.set(SERVICE, NOT_SERVING)
        await self._grpc.start()
        with ThreadPoolExecutor(1, "load") as loader:  # ends with it, and its OpenMP team too: see device/
            models = await asyncio.get_running_loop().run_in_executor(loader, load_models, self.config)
        self.engine = Engine(
            models, max_rows_owed=self.config.max_rows_owed, batch_invariant=self.config.batch_invariant
        )
        self.engine.start()
        self._servicer.engine = self.engine
        await self._health.set(SERVICE, SERVING)
        log.info("ready", address=self.address, models=[*models], methods=sorted(registry.METHODS))

    async def stop(self, grace_s: float) -> None:
        """Is not ready, refuses new work, finishes what runs within `grace_s` seconds, fails the rest."""
        await self._health.set(SERVICE, NOT_SERVING)
        await self._grpc.stop(grace_s)
        if self.engine is not None:
            await asyncio.to_thread(self.engine.close)


def load_models(config: Config) -> dict[str, Model]:
    """All models of the configuration, loaded and warm, the first one first. Raises ConfigError."""
    device = pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    registry.discover()
    models = {}
    for settings in config.models:
        models[settings.name] = load(settings, device)
        for model in models[settings.name].precisions.values():
            warm_up(model, settings.batch_size)
            log.info(
                "loaded",
                model=model.name,
                precision=model.precision,
                digest=model.digest,
                device=device.type,
                batch_sizes=model.batch_sizes,
            )
    return models


def pick_device(name: str) -> torch.device:
    """The device of that name; for "auto" a GPU if there is any. Raises ConfigError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: {name} was asked for, but torch sees no GPU")
    return torch.device(name)


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
    except ConfigError:
        await server.stop(0)
        raise
    _on(loop, signals, stopping.set)
    ready(server)
    assert server.engine is not None, "a ready server has an engine"
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
