"""A replica: a camserve server, to which the proxies of Serve connect."""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any

import grpc
import ray
import structlog

from camserve.addresses import is_loopback
from camserve_ray.connection import host_of_node
from camserve_ray.serving.autoscaling import ROWS_OWED
from camserve_ray.serving.endpoints import Endpoint
from camserve_ray.serving.services import SECRET
from camserve_server.config import Config
from camserve_server.service.logs import log_to_stderr
from camserve_server.service.server import Server
from camserve_server.torch_setup.allocator import keep_memory
from camserve_server.torch_setup.device import pick_device

# Seconds before the end of `grace_s` at which the server fails the calls that still run. Serve first waits for up to
# four seconds, and kills the process at the end.
_END_S = 6.0
# Seconds that the server may take to stop if `grace_s` is short.
_STOP_S = 1.0
# Seconds of a call of `Hold`. It delays the end of the replica by as much.
_HOLD_S = 2.0

log = structlog.get_logger()


class Message:
    """An empty message, for Serve, which calls this method of responses."""

    def SerializeToString(self) -> bytes:  # noqa: N802
        """Return the message."""
        return b""


class Replica:
    """A deployment of Serve. Serve starts it, checks it, ends it, and tells proxies its endpoint.

    Args:
        config: The configuration. The replica serves no listener of it, but a port of its own for proxies.
    """

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it
        log_to_stderr(config)
        if pick_device(config.device).type == "cpu":
            keep_memory()
        secret = secrets.token_urlsafe(32)
        self._grace_s = config.grace_s
        self._server = Server(_of_replica(config, _node()), interceptors=(_ProxiesOnly(secret),))
        await self._server.start()
        self._endpoint = Endpoint(self._server.address, secret, is_loopback(config.listen))
        # Serve would send calls to this replica until it has failed several health checks, which takes half a minute.
        self._server.engines.failed.add_done_callback(_end_process)

    async def __del__(self) -> None:
        """Stop the server after its running calls. Proxies send no further calls when Serve calls it."""
        await self._server.stop(max(_STOP_S, self._grace_s - _END_S))

    def record_replica_metadata(self) -> dict[str, Any]:
        """Return what Serve tells proxies."""
        return self._endpoint._asdict()

    def record_autoscaling_stats(self) -> dict[str, int]:
        """Return the metric for autoscaling."""
        return {ROWS_OWED: self._server.engines.rows_owed()}

    async def Hold(self, request: bytes) -> Message:  # noqa: N802
        """Return after some time. A proxy calls it again and again while it passes on calls."""
        await asyncio.sleep(_HOLD_S)
        return Message()


class _ProxiesOnly(grpc.aio.ServerInterceptor):
    """Refuses calls without the secret of the replica.

    Args:
        secret: The secret.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the handler of the call, or one that refuses it."""
        given: Any = dict(handler_call_details.invocation_metadata or ()).get(SECRET, "")
        if hmac.compare_digest(given.encode(), self._secret):
            return await continuation(handler_call_details)
        return grpc.unary_unary_rpc_method_handler(_refuse)


async def _refuse(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    await context.abort(
        grpc.StatusCode.PERMISSION_DENIED, "this port is for the proxies of Ray Serve; call one of them"
    )


def _end_process(failed: Future[None]) -> None:
    """End the process at once, so that Serve replaces the replica."""
    log.error("the engine's thread failed; the replica ends")
    os._exit(1)


def _node() -> str:
    """Return the address of this node, by which other nodes reach it."""
    untyped: Any = ray
    return host_of_node(str(untyped.util.get_node_ip_address()))


def _of_replica(config: Config, host: str) -> Config:
    """Return the configuration of the server in a replica: it has no listener but a free port for proxies."""
    without: Mapping[str, Any] = dict.fromkeys(("health_listen", "metrics_listen", "admin_listen"))
    return config.model_copy(
        update={**without, "listen": f"{host}:0", "insecure": True, "frontends": 1, "reflection": False}
    )
