"""Deploys the application for as long as a process runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import serve as ray_serve

from camserve.addresses import split_host_port
from camserve_ray.connection import connect, host_of_node
from camserve_ray.serving.application import LOGGING, Scale, application, check_scale, checked, grpc_options
from camserve_ray.serving.services import NAME
from camserve_server.config import Config, read_config
from camserve_server.errors import ConfigError
from camserve_server.service.frontends.port import SharedPort

__all__ = ["serve"]

# Seconds in which a proxy of a running application has to respond.
_PROXY_S = 30.0
_REPORT_S = 30.0
# Ray by default runs its processes with a low priority, so other programs on the machine would delay requests.
_PRIORITY = ("RAY_worker_niceness", "0")
# Seconds that the end of replicas may take after `grace_s`, and between looks at the state.
_END_S = 30.0
_POLL_S = 0.2


def serve(
    scale: Scale,
    *,
    config: Path | None = None,
    listen: str | None = None,
    insecure: bool | None = None,
    address: str | None = None,
) -> int:
    """Deploy the application, wait for SIGINT or SIGTERM, and end it.

    Args:
        scale: The replicas.
        config: The TOML file of the configuration; None for the environment and the defaults only.
        listen: Overrides the address. Ray Serve uses its port, on all addresses of each node.
        insecure: Overrides the permission to accept calls from other machines without TLS.
        address: The Ray cluster; None starts one on this machine. See `camserve_ray.connection.connect`.

    Returns:
        The exit status: 0 after a signal, 1 if a replica could not start, 2 for an invalid configuration.
    """
    try:
        check_scale(scale)
        settings = read_config(config, listen=listen, insecure=insecure)
        for warning in checked(settings):
            print(f"warning: {warning}", file=sys.stderr)
        if address is None:
            _check_port(settings)
            os.environ.setdefault(*_PRIORITY)  # of the cluster that `connect` starts
        connect(address)
    except ConfigError as error:
        return _failed(error, 2)
    except KeyboardInterrupt:
        return 0
    except SystemExit as error:  # from Ray's handler of SIGTERM
        if error.code != signal.SIGTERM:
            raise
        return 0
    deployment = _Deployment(settings, scale)
    with _handling(_interrupt):  # not earlier, because Ray sets a handler when it connects
        try:
            at = deployment.start()
            names = ", ".join(model.name for model in settings.models)
            print(f"camserve is ready on {at}, serving {names}", flush=True)
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return 0
        except ConfigError as error:
            return _failed(error, 2)
        except RuntimeError as error:
            return _failed(RuntimeError("\n".join([str(error), *_messages()])), 1)
        finally:
            with _handling(signal.SIG_DFL):  # a second signal ends the process at once
                deployment.end()


def _check_port(config: Config) -> None:
    """Check that no other process of this machine listens on the port. Raises ConfigError.

    The proxies would share the port with the proxies of another cluster, so each of them would get some of the calls.
    """
    SharedPort(f"0.0.0.0:{split_host_port(config.listen)[1]}").close()


class _Deployment:
    """The application on the cluster that this process is connected to.

    Args:
        config: The configuration of each replica.
        scale: The replicas.
    """

    def __init__(self, config: Config, scale: Scale) -> None:
        self._config = config
        self._scale = scale
        self._started = False
        self._deployed = False

    def start(self) -> str:
        """Start the replicas, and return the address of a proxy.

        Raises:
            ConfigError: The cluster already runs camserve, or its proxies do not serve it.
            RuntimeError: A replica could not start.
        """
        # camserve has no HTTP endpoint, and 8000, the default port, may be in use.
        ray_serve.start(
            http_options={"host": "127.0.0.1", "port": 0},
            grpc_options=grpc_options(self._config),
            logging_config=LOGGING,
        )
        self._started = True
        if NAME in ray_serve.status().applications:
            raise ConfigError(
                f"the application {NAME!r} already runs on this cluster; expected a cluster without it; end the "
                "command that has deployed it and wait until its calls have ended, or use another cluster"
            )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its messages name an HTTP address
        self._deployed = True
        with _progress():
            ray_serve.run(application(self._config, self._scale), name=NAME, route_prefix=f"/{NAME}")
        address = f"{_head()}:{grpc_options(self._config)['port']}"
        if not _serves(address):
            raise ConfigError(
                f"listen: the proxy of Ray Serve at {address} does not serve camserve; if Serve was started on this "
                "cluster with other options, end it with `serve shutdown` and run this command again"
            )
        return address

    def end(self) -> None:
        """End the application after its running calls, and the cluster if this process has started it."""
        untyped_ray: Any = ray
        untyped_serve: Any = ray_serve
        try:
            if self._deployed:
                ray_serve.delete(NAME, _blocking=False)  # or Serve waits for a minute, whatever the running calls need
                self._wait_for_end()
            if self._started and not ray_serve.status().applications:  # those of others on this cluster
                untyped_serve.shutdown()
        finally:
            untyped_ray.shutdown()

    def _wait_for_end(self) -> None:
        """Wait until the application has ended. Serve ends replicas whose calls take longer than `grace_s`."""
        end = time.monotonic() + self._config.grace_s + _END_S
        while NAME in ray_serve.status().applications:
            if time.monotonic() > end:
                print(f"warning: the application {NAME!r} still ends; Ray Serve goes on with that", file=sys.stderr)
                return
            time.sleep(_POLL_S)


@contextmanager
def _progress() -> Iterator[None]:
    """Print every half minute why the application is not ready, for example because the cluster has no free GPU."""
    ready = threading.Event()

    def report() -> None:
        while not ready.wait(_REPORT_S):
            for message in _messages():
                print(f"waiting: {message}", file=sys.stderr)

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ready.set()
        thread.join()


def _messages() -> list[str]:
    """Return what Serve says about the deployment: what it waits for, or why its replicas could not start."""
    found = ray_serve.status().applications.get(NAME)
    deployments = found.deployments.values() if found else ()
    return [summary(each.message) or f"the replicas are {each.status.lower()}" for each in deployments]


def summary(message: str) -> str:
    """Return the first line of a message, and the last one of the traceback in it, which is in Ray's log, too."""
    first, *others = [line.strip() for line in message.splitlines() if line.strip()] or [""]
    traceback = any("Traceback (most recent call last)" in line for line in others)
    return f"{first} {others[-1]}" if traceback else " ".join([first, *others])


def _head() -> str:
    """Return the host of the head, which always has a proxy; the loopback address if this machine is the head."""
    untyped: Any = ray
    [head] = [node for node in untyped.nodes() if "node:__internal_head__" in node["Resources"]]
    host = str(head["NodeManagerAddress"])
    return "127.0.0.1" if host == untyped.util.get_node_ip_address() else host_of_node(host)


def _serves(address: str) -> bool:
    """Return True as soon as Health at the address reports that camserve is ready."""
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:  # a node of the cluster
        health, end = health_pb2_grpc.HealthStub(channel), time.monotonic() + _PROXY_S
        while time.monotonic() < end:
            try:
                state = health.Check(health_pb2.HealthCheckRequest(), timeout=_PROXY_S, wait_for_ready=True).status
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    return False
                state = None
            if state == health_pb2.HealthCheckResponse.SERVING:
                return True
            time.sleep(0.5)
    return False


def _failed(error: Exception, exit_status: int) -> int:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return exit_status


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Handle SIGINT and SIGTERM with a function in the context."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
