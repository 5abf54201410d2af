"""A replica: a camserve server on a private Unix socket, and the methods that Serve calls."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
import structlog
from ray.serve.grpc_util import RayServegRPCContext

from camserve.addresses import is_loopback
from camserve_ray.serving.autoscaling import ROWS_OWED
from camserve_ray.serving.services import CHECK, FROM_REPLICA, RPCS, TIMEOUT_MS, Rpc
from camserve_server.config import Config
from camserve_server.errors import CamserveError, PermissionDenied
from camserve_server.service import status
from camserve_server.service.call import checked_request_id
from camserve_server.service.listeners import LINK
from camserve_server.service.logs import log_to_stderr
from camserve_server.service.server import Server
from camserve_server.torch_setup.allocator import keep_memory
from camserve_server.torch_setup.device import pick_device

# Seconds that the server may take to stop; Serve has already waited for running calls.
_STOP_S = 1.0
_PASSED_ON = ("authorization", "traceparent", "tracestate")

log = structlog.get_logger()


class Encoded:
    """An encoded message, for Serve, which calls this method of responses."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:  # noqa: N802
        """Return the message."""
        return self._data


class Replica:
    """A deployment of Serve with a method for each RPC, which takes and returns encoded messages.

    A failed call returns an empty message, and the context carries the status. Serve would not pass on the trailing
    metadata of an exception.

    Args:
        config: The configuration. The replica serves no listener of it.
    """

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it
        log_to_stderr(config)
        if pick_device(config.device).type == "cpu":
            keep_memory()
        self._local_callers_only = is_loopback(config.listen)
        self._folder = Path(tempfile.mkdtemp(prefix="camserve-replica-"))
        listen = f"unix://{self._folder}/replica.sock"
        self._server = Server(_of_replica(config, listen))
        try:
            await self._server.start()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        # Serve would send calls to this replica until it has failed several health checks, which takes half a minute.
        self._server.engines.failed.add_done_callback(_end_process)
        self._channel = grpc.aio.insecure_channel(listen, options=LINK)

    async def __del__(self) -> None:
        """Stop the server. Serve calls it after the last call has ended."""
        await self._channel.close()
        await self._server.stop(_STOP_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def record_autoscaling_stats(self) -> dict[str, int]:
        """Return the metric for autoscaling."""
        return {ROWS_OWED: self._server.engines.rows_owed()}

    async def unary(self, rpc: Rpc, request: bytes, context: RayServegRPCContext) -> Encoded:
        """Pass on a call with one response.

        Args:
            rpc: The RPC.
            request: The encoded request.
            context: The context of Serve, which gets the status of a failed call.
        """
        try:
            if rpc != CHECK:
                self._check_peer(context)
            send: Any = self._channel.unary_unary(rpc.path)
            response: bytes = await send(request, **_options(context))
            return Encoded(response)
        except grpc.aio.AioRpcError as error:
            _set_status(context, error.code(), error.details() or "", error.trailing_metadata())
        except CamserveError as error:
            _set_error(context, error)
        return Encoded(b"")

    async def stream(self, rpc: Rpc, request: bytes, context: RayServegRPCContext) -> AsyncIterator[Encoded]:
        """Pass on a call with several responses. If it fails, an empty message follows them."""
        try:
            self._check_peer(context)
            send: Any = self._channel.unary_stream(rpc.path)
            call = send(request, **_options(context))
            try:
                async for response in call:
                    yield Encoded(response)
            finally:
                call.cancel()  # has no effect on a call that has ended
            return
        except grpc.aio.AioRpcError as error:
            _set_status(context, error.code(), error.details() or "", error.trailing_metadata())
        except CamserveError as error:
            _set_error(context, error)
        yield Encoded(b"")

    def _check_peer(self, context: RayServegRPCContext) -> None:
        """Refuse calls from other machines if `listen` is a loopback address. Serve listens on all addresses."""
        if self._local_callers_only and not _is_local(context.peer()):
            raise PermissionDenied(
                "the call comes from another machine, and listen of the server is a loopback address; set "
                'listen = "0.0.0.0:PORT" and insecure = true if you trust the network'
            )


def _end_process(failed: Future[None]) -> None:
    """End the process at once, so that Serve replaces the replica."""
    log.error("the engine's thread failed; the replica ends")
    os._exit(1)


def _method(rpc: Rpc) -> Callable[..., Any]:
    """Return the method of `Replica` for an RPC. Serve finds methods by the names of RPCs and of arguments."""

    async def unary(self: Replica, request: bytes, grpc_context: RayServegRPCContext) -> Encoded:
        return await self.unary(rpc, request, grpc_context)

    async def stream(self: Replica, request: bytes, grpc_context: RayServegRPCContext) -> AsyncIterator[Encoded]:
        async for response in self.stream(rpc, request, grpc_context):
            yield response

    function: Any = stream if rpc.streaming else unary
    function.__name__ = rpc.name
    return function  # type: ignore[no-any-return]


for _rpc in RPCS:
    setattr(Replica, _rpc.name, _method(_rpc))


def _of_replica(config: Config, listen: str) -> Config:
    """Return the configuration of the server in a replica: it has no listener but its socket."""
    without: Mapping[str, Any] = dict.fromkeys(("health_listen", "metrics_listen", "admin_listen"))
    return config.model_copy(
        update={**without, "listen": listen, "socket_mode": "600", "frontends": 1, "reflection": False}
    )


def _options(context: RayServegRPCContext) -> dict[str, Any]:
    """Return the timeout and the metadata of the call that is passed on."""
    values = dict(context.invocation_metadata())
    left_ms = values.get(TIMEOUT_MS)
    metadata = tuple((key, value) for key, value in context.invocation_metadata() if key in _PASSED_ON)
    return {"metadata": metadata, "timeout": None if left_ms is None else int(left_ms) / 1e3}


def _is_local(peer: str) -> bool:
    """Return True for a peer of gRPC on this machine, for example "ipv4:127.0.0.1:4711" or "ipv6:%5B::1%5D:4711"."""
    return is_loopback(unquote(peer))


def _set_error(context: RayServegRPCContext, error: CamserveError) -> None:
    _set_status(context, status.code(error), error.message, status.trailing_metadata(error, checked_request_id("")))


def _set_status(context: RayServegRPCContext, code: grpc.StatusCode, details: str, trailing: Any) -> None:
    context.set_code(code)
    context.set_details(details)
    context.set_trailing_metadata([*((key, value) for key, value in trailing or ()), (FROM_REPLICA, "1")])
