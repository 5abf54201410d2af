"""The gRPC server for callers, which the engine process or the front ends run, and the binding of addresses."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection

from camserve.addresses import socket_path
from camserve.v1 import explain_pb2, explain_pb2_grpc
from camserve_server import open_inference
from camserve_server.config import Config, TLSConfig
from camserve_server.errors import ConfigError
from camserve_server.service.bounds import SizeLimits
from camserve_server.service.health import Health
from camserve_server.service.load_reports.reports import LoadReports
from camserve_server.service.security import CountRefusal, Guard
from camserve_server.service.tls import credentials

if TYPE_CHECKING:  # importing the stubs would register their messages: see open_inference
    from camserve_server.open_inference.inference_pb2_grpc import GRPCInferenceServiceServicer

SERVICE = explain_pb2.DESCRIPTOR.services_by_name["ExplainService"].full_name
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
EXCLUSIVE_PORT = ("grpc.so_reuseport", 0)  # binding fails if another server uses the port
SHARED_PORT = ("grpc.so_reuseport", 1)
# Options of both ends of the link between front ends and engine process. The limits are those of the callers' server,
# and the callers decide about retries.
LINK = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 64 << 10),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]
KEEPALIVE = (  # clients ping every 30 s; by default, gRPC closes connections with more than one ping in five minutes
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The server pings clients, too, to end the calls of clients that have disappeared without closing the connection.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),  # for the acknowledgement of sent data
    ("grpc.http2.ping_timeout_ms", 20_000),  # for the response to a ping; the default is a minute
    ("grpc.http2.max_pings_without_data", 0),
)
# Clients find new replicas only when they connect again. Running calls are finished on the old connection.
CONNECTION_AGE = ("grpc.max_connection_age_ms", 600_000)
STOP_GRACE_S = 0.5  # for responses in transfer; watchers of Health would never end by themselves


def services(config: Config) -> tuple[str, ...]:
    """Return the full names of the services for callers, whose states Health reports."""
    return (SERVICE, open_inference.SERVICE) if config.open_inference else (SERVICE,)


def callers_server(
    config: Config,
    servicer: explain_pb2_grpc.ExplainServiceServicer,
    health: Health,
    count_refusal: CountRefusal,
    inference: GRPCInferenceServiceServicer | None,
    loads: LoadReports,
    *,
    port: tuple[str, int] = EXCLUSIVE_PORT,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> grpc.aio.Server:
    """Return the gRPC server for callers, without a port.

    Args:
        config: The configuration.
        servicer: Implements ExplainService.
        health: Implements Health.
        count_refusal: Counts calls whose token or certificate is not allowed.
        inference: Implements the Open Inference Protocol; None if the configuration disables it.
        loads: Implements the load reports.
        port: Whether several processes share the port.
        interceptors: Interceptors that run before those of the server.
    """
    files = []
    if inference is not None:
        from camserve_server.open_inference import inference_pb2

        files.append(inference_pb2.DESCRIPTOR)
    server = grpc.aio.server(
        interceptors=[*interceptors, Guard(config, count_refusal), SizeLimits(*files)],
        options=[
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
            port,
            *KEEPALIVE,
            CONNECTION_AGE,
        ],
    )
    explain_pb2_grpc.add_ExplainServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    add_inference(inference, server)
    loads.add_to(server)
    if config.reflection:
        reflection.enable_server_reflection([*services(config), HEALTH_SERVICE, reflection.SERVICE_NAME], server)
    return server


def add_inference(inference: GRPCInferenceServiceServicer | None, server: grpc.aio.Server) -> None:
    """Let a gRPC server serve the Open Inference Protocol, unless the configuration disables it."""
    if inference is not None:
        from camserve_server.open_inference import inference_pb2_grpc

        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(inference, server)


def bind(
    server: grpc.aio.Server, key: str, address: str, tls: TLSConfig | None = None, *, socket_mode: str = "600"
) -> str:
    """Bind an address.

    Args:
        server: Serves the address.
        key: The key of the address in the configuration.
        address: HOST:PORT, or a Unix socket.
        tls: The certificates; None for plaintext.
        socket_mode: The file mode of a Unix socket, in octal.

    Returns:
        The address with the selected port.

    Raises:
        ConfigError: The address cannot be bound.
    """
    path = socket_path(address)
    if path is not None:
        return _bind_socket(server, key, address, Path(path), tls, int(socket_mode, 8))
    host = address.rpartition(":")[0]
    return f"{host}:{_bind(server, key, address, tls)}"


def _bind(server: grpc.aio.Server, key: str, address: str, tls: TLSConfig | None) -> int:
    try:
        port = server.add_secure_port(address, credentials(tls)) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        raise cannot_bind(key, address) from error
    return int(port)


def _bind_socket(server: grpc.aio.Server, key: str, address: str, path: Path, tls: TLSConfig | None, mode: int) -> str:
    """Bind a Unix socket that only users with permissions of `mode` can connect to."""
    with socket.socket(socket.AF_UNIX) as probe:
        # gRPC removes an existing socket, also one on which another server listens.
        if path.is_socket() and probe.connect_ex(str(path)) == 0:
            raise cannot_bind(key, address)
    mask = os.umask(0o777 & ~mode)
    try:
        _bind(server, key, address, tls)
    finally:
        os.umask(mask)
    return address


def cannot_bind(key: str, address: str) -> ConfigError:
    """Return the error about an address that cannot be bound."""
    remedy = (
        "its folder exists and is writable and that no other server uses it"
        if socket_path(address) is not None
        else "the address belongs to this machine and that the port is free"
    )
    return ConfigError(f"{key}: cannot bind {address}; check that {remedy}")


class OwnPort:
    """The port for callers in the engine's process.

    Args:
        server: Serves the callers.
        config: The configuration.
    """

    def __init__(self, server: grpc.aio.Server, config: Config) -> None:
        self._server = server
        self._config = config

    def bind(self) -> str:
        """Bind the port and return its address. Raises ConfigError."""
        config = self._config
        return bind(self._server, "listen", config.listen, config.tls, socket_mode=config.socket_mode)

    async def start(self) -> None:
        """Accept connections."""
        await self._server.start()

    async def ready(self) -> None:
        """Return, because connections are accepted since `start`."""

    async def stop(self) -> None:
        """Stop the server."""
        await self._server.stop(STOP_GRACE_S)
