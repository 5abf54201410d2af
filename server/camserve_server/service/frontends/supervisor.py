"""The engine process's control of its front ends: it starts them, restarts those that end, and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc

from camserve.v1 import explain_pb2_grpc
from camserve_server.config import Config
from camserve_server.errors import ConfigError
from camserve_server.service.frontends import link_pb2_grpc, shared_memory
from camserve_server.service.frontends.control import READY, STOP
from camserve_server.service.frontends.identity import TrustFrontEnds
from camserve_server.service.frontends.link import LinkServicer
from camserve_server.service.frontends.port import SharedPort
from camserve_server.service.frontends.shared_memory import SharedMemory
from camserve_server.service.health import Health
from camserve_server.service.listeners import LINK, add_inference
from camserve_server.service.load_reports.reports import LoadReports
from camserve_server.service.prometheus import Metrics
from camserve_server.service.servicer import Servicer
from camserve_server.service.tls import credentials, paths

if TYPE_CHECKING:  # importing the stubs would register their messages: see open_inference
    from camserve_server.open_inference.inference_pb2_grpc import GRPCInferenceServiceServicer

FIRST_DELAY_S, LAST_DELAY_S = 0.1, 30.0  # before a restart; the delay doubles while a front end keeps ending
STABLE_S = 60.0  # after this time, the delay starts again from the first one
STOP_S = 5.0  # a front end that has not ended this long after its grace is killed

log = structlog.get_logger()


class FrontEnds:
    """The front-end processes of a server, and the engine process's end of the link to them.

    Args:
        config: The configuration.
        servicer: Runs the calls.
        health: The states of the services, which the front ends copy.
        metrics: Counts the calls that front ends refuse.
        inference: Implements the Open Inference Protocol; None if the configuration disables it.
        loads: The load reports, which the front ends copy.

    Attributes:
        restarts: The number of front ends that have been started in place of others that had ended.
    """

    def __init__(
        self,
        config: Config,
        servicer: Servicer,
        health: Health,
        metrics: Metrics,
        inference: GRPCInferenceServiceServicer | None,
        loads: LoadReports,
    ) -> None:
        self.restarts = 0
        self._config = config
        self._health = health
        self._link = LinkServicer(config, servicer, metrics)
        self._server = grpc.aio.server(interceptors=[TrustFrontEnds(config)], options=LINK)
        link_pb2_grpc.add_LinkServiceServicer_to_server(self._link, self._server)
        explain_pb2_grpc.add_ExplainServiceServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        add_inference(inference, self._server)
        loads.add_to(self._server)
        self._identifiers = itertools.count(1)
        self._port: SharedPort | None = None
        self._folder: Path | None = None
        self._stopping = asyncio.Event()
        self._keepers: list[asyncio.Task[None]] = []
        self._processes: set[Process] = set()
        self._ready: list[asyncio.Future[None]] = []

    @property
    def running(self) -> int:
        """The number of front ends that run."""
        return len(self._processes)

    def bind(self) -> str:
        """Bind the port for callers and the socket of the link.

        Returns:
            The address for callers, with the selected port.

        Raises:
            ConfigError: An address cannot be bound, or the system lacks SO_REUSEPORT or memfd_create.
        """
        if not (hasattr(socket, "SO_REUSEPORT") and hasattr(os, "memfd_create")):
            raise ConfigError("frontends: several front ends need Linux; set frontends = 1")
        if self._config.tls is not None:
            credentials(self._config.tls)  # raises ConfigError now, not in each front end
        self._port = SharedPort(self._config.listen)
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="camserve-"))  # with permissions for this user only
            self._server.add_insecure_port(f"unix:{self._folder / 'link'}")
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"frontends: cannot create a socket in {self._folder or tempfile.gettempdir()}; set TMPDIR to a folder "
                "with a short path that is writable"
            ) from error
        return self._port.address

    async def start(self) -> None:
        """Start the front ends. They serve Health while the models are loaded."""
        await self._server.start()
        for _ in range(self._config.frontends):
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            # Reading the exception prevents asyncio's warning about an exception that was never retrieved.
            ready.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._ready.append(ready)
            self._keepers.append(asyncio.create_task(self._keep(ready)))

    async def ready(self) -> None:
        """Wait until all front ends accept connections.

        Raises:
            ConfigError: A front end ended before that.
        """
        await asyncio.gather(*self._ready)

    async def stop(self) -> None:
        """Stop the front ends and the link. Calls that still run get a moment to end."""
        self._stopping.set()
        for process in self._processes:
            _tell(process, STOP)
        for ready in self._ready:
            ready.cancel()
        if self._keepers:
            _, late = await asyncio.wait(self._keepers, timeout=STOP_S)
            for process in [*self._processes]:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await asyncio.gather(*late, return_exceptions=True)
        await self._server.stop(0)
        if self._port is not None:
            self._port.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _keep(self, ready: asyncio.Future[None]) -> None:
        """Run a front end, and a new one whenever it ends."""
        delay_s = FIRST_DELAY_S
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                result = f"ended with status {await self._run(next(self._identifiers), ready)}"
            except OSError as error:  # the system is out of processes, files or memory
                log.error("front end cannot be started", reason=str(error))
                result = f"cannot be started: {error}"
            if self._stopping.is_set():
                return
            if not ready.done():
                ready.set_exception(ConfigError(f"frontends: a front end {result}; see the log"))
                return
            delay_s = FIRST_DELAY_S if time.monotonic() - started > STABLE_S else delay_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()
            delay_s = min(2 * delay_s, LAST_DELAY_S)

    async def _run(self, identifier: int, ready: asyncio.Future[None]) -> int:
        """Run a front end until it ends, and return its exit status."""
        memory = shared_memory.create()
        try:
            self._link.memories[identifier] = SharedMemory(memory)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-P", "-m", "camserve_server.service.frontends"),  # -P: without the working directory in sys.path
                stdin=PIPE,
                stdout=PIPE,
                pass_fds=[memory],
            )
        except OSError:
            self._link.remove(identifier)
            raise
        finally:
            os.close(memory)
        self._processes.add(process)
        self.restarts += identifier > self._config.frontends
        try:
            _tell(process, json.dumps(self._settings(identifier, memory)))
            if self._stopping.is_set():
                _tell(process, STOP)
            assert process.stdout is not None
            while line := await process.stdout.readline():
                if line.decode().strip() == READY and not ready.done():
                    ready.set_result(None)
            status = await process.wait()
        finally:
            self._processes.discard(process)
            self._link.remove(identifier)
        if not self._stopping.is_set():
            log.error("front end ended", pid=process.pid, exit_code=status)
        return status

    def _settings(self, identifier: int, memory: int) -> dict[str, Any]:
        """Return what a front end needs to know. It travels through a pipe, so that other users cannot read it."""
        assert self._port is not None and self._folder is not None, "start follows bind"
        config: dict[str, Any] = {**self._config.model_dump(mode="json"), "models": []}
        if (tls := self._config.tls) is not None:
            config["tls"] |= {key: str(path.absolute()) for key, path in paths(tls).items()}
        return {
            "config": config,
            "address": self._port.address,
            "identifier": identifier,
            "folder": str(self._folder),
            "memory": memory,
            "services": self._health.services,
        }


def _tell(process: Process, line: str) -> None:
    """Write a line to the standard input of a front end, which may have ended."""
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError, RuntimeError):
        process.stdin.write(f"{line}\n".encode())
