"""REST and gRPC listeners of the explainer, put together from the parts of the SDK.

`kserve.ModelServer` always listens on all addresses, reports that it is ready whatever happens to the camserve server,
sends the headers of a request back to the caller, and does not limit the size of requests.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fastapi
import grpc
import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_interceptor.exceptions import GrpcException
from kserve import ModelRepository
from kserve import errors as sdk_errors
from kserve.logging import configure_logging
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest.server import metrics_handler
from kserve.protocol.rest.v1_endpoints import register_v1_endpoints
from kserve.protocol.rest.v2_endpoints import register_v2_endpoints

from camserve import aio
from camserve.addresses import proxy_options
from camserve.connection import SERVICE
from camserve.errors import CamserveError, InvalidArgument, NotFound, Unavailable
from camserve.images import MAX_MESSAGE_BYTES
from camserve.version import __version__
from camserve_kserve import responses
from camserve_kserve.dataplane import Dataplane, Repository
from camserve_kserve.explainer import Explainer
from camserve_kserve.guard import RequestGuard

__all__ = ["Settings", "run"]

log = logging.getLogger("kserve.camserve")

HEALTH_TIMEOUT_S = 2.0
GRACE_S = 30
# Errors of the SDK → errors with the same HTTP status.
_SDK_ERRORS: dict[type[Exception], type[CamserveError]] = {
    sdk_errors.InvalidInput: InvalidArgument,
    sdk_errors.InferenceError: InvalidArgument,
    sdk_errors.ModelNotFound: NotFound,
    sdk_errors.ModelNotReady: Unavailable,
    sdk_errors.ServerNotReady: Unavailable,
}


@dataclass(frozen=True)
class Settings:
    """Settings of the explainer.

    Attributes:
        name: Name of the model in the paths of KServe.
        model: Name of the camserve model. None selects the server's first model.
        host: Address to listen on.
        http_port: Port of REST; 0 selects a free one.
        grpc_port: Port of gRPC; 0 selects a free one.
        max_body_bytes: Maximum size of the body of a request of REST.
    """

    name: str
    model: str | None
    host: str
    http_port: int
    grpc_port: int
    max_body_bytes: int


def run(
    settings: Settings,
    client: aio.Client,
    credentials: grpc.ChannelCredentials | None,
    ready: Callable[[str, str], object],
) -> None:
    """Serve until SIGTERM or SIGINT. Running requests then have 30 s to finish.

    Args:
        settings: The settings.
        client: Client of the camserve server. It is closed at the end.
        credentials: TLS credentials for the health checks of the camserve server, or None for plaintext.
        ready: Called with the addresses of REST and gRPC when both accept requests.

    Raises:
        OSError: A port is not available.
    """
    configure_logging()
    warnings.filterwarnings("ignore", "ORJSONResponse is deprecated")  # The SDK uses it.
    asyncio.run(_serve(settings, client, credentials, ready))


async def _serve(
    settings: Settings,
    client: aio.Client,
    credentials: grpc.ChannelCredentials | None,
    ready: Callable[[str, str], object],
) -> None:
    options = proxy_options(client.address)
    async with (
        grpc.aio.secure_channel(client.address, credentials, options)
        if credentials
        else grpc.aio.insecure_channel(client.address, options)
    ) as channel:
        models = ModelRepository()
        models.update(Explainer(settings.name, client, settings.model))
        dataplane = Dataplane(models, lambda: _is_ready(channel))
        listener = _listener(settings)
        grpc_server, grpc_port = _grpc_server(dataplane, settings)
        await grpc_server.start()
        # log_config=None keeps the configuration of the SDK.
        config = uvicorn.Config(_application(dataplane, settings), log_config=None, timeout_graceful_shutdown=GRACE_S)
        http_server = _HttpServer(config, grpc_server)
        # uvicorn handles signals only while it serves. One that comes earlier must also end this process, and uvicorn
        # raises signals again when it has stopped.
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, http_server.handle_exit)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        ready(f"{host}:{listener.getsockname()[1]}", f"{host}:{grpc_port}")
        await http_server.serve([listener])
    await client.close()


class _HttpServer(uvicorn.Server):
    """REST server that stops gRPC at the same time."""

    def __init__(self, config: uvicorn.Config, grpc_server: grpc.aio.Server) -> None:
        super().__init__(config)
        self._grpc_server = grpc_server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.gather(super().shutdown(sockets), self._grpc_server.stop(GRACE_S))


def _listener(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.http_port), family=family, backlog=2048)
    except OSError as error:
        raise _not_available(settings.host, settings.http_port, error) from error


def _not_available(host: str, port: int, error: Exception) -> OSError:
    return OSError(f"cannot listen on port {port} of {host}: {error}; pass a free port, or another --host")


def _grpc_server(dataplane: Dataplane, settings: Settings) -> tuple[grpc.aio.Server, int]:
    limits = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    server = grpc.aio.server(interceptors=(_Errors(),), options=[*limits, ("grpc.so_reuseport", 0)])
    add_GRPCInferenceServiceServicer_to_server(InferenceServicer(dataplane, Repository(dataplane)), server)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        return server, server.add_insecure_port(f"{host}:{settings.grpc_port}")
    except RuntimeError as error:
        raise _not_available(settings.host, settings.grpc_port, error) from error


def _application(dataplane: Dataplane, settings: Settings) -> RequestGuard:
    app = fastapi.FastAPI(title="camserve", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/", dataplane.live)
    app.add_api_route("/metrics", metrics_handler)
    register_v1_endpoints(app, dataplane, Repository(dataplane))
    register_v2_endpoints(app, dataplane, Repository(dataplane))
    app.add_exception_handler(CamserveError, _failed)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(NotImplementedError, _not_implemented)
    for kind in _SDK_ERRORS:
        app.add_exception_handler(kind, _failed_in_sdk)
    return RequestGuard(app, settings.max_body_bytes)


async def _is_ready(channel: grpc.aio.Channel) -> bool:
    """Ask the camserve server. A server, or a proxy before it, without health checks counts as ready."""
    try:
        response = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=HEALTH_TIMEOUT_S
        )
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNIMPLEMENTED
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


# ---- errors ----------------------------------------------------------------------------------------------------------


async def _failed(_: fastapi.Request, error: Exception) -> JSONResponse:
    assert isinstance(error, CamserveError)
    content, headers = responses.error_content(error)
    status = responses.http_status(error)
    # The message for the caller quotes values of the request, such as labels.
    what = f"HTTP status {status}, {error.reason or type(error).__name__}, request {error.request_id!r}"
    if status in (502, 503):  # the connection to the camserve server, which an operator can repair
        what += f": {error.message}"
    log.log(logging.WARNING if status >= 500 else logging.INFO, "%s: %s", error.code.name, what)
    return JSONResponse(content, status, headers)


def _converted(error: Exception) -> CamserveError:
    """Return the camserve error for an error of the SDK."""
    kind = next(kind for sdk, kind in _SDK_ERRORS.items() if isinstance(error, sdk))
    return kind(str(error))


async def _failed_in_sdk(request: fastapi.Request, error: Exception) -> JSONResponse:
    return await _failed(request, _converted(error))


class _Errors(ExceptionToStatusInterceptor):  # type: ignore[misc]
    """Sends errors of the SDK to callers of gRPC. The SDK would log them with values of the request."""

    async def handle_exception(self, error: Exception, request: Any, context: Any, rpc: str) -> None:
        """Abort the call."""
        if isinstance(error, tuple(_SDK_ERRORS)):
            converted = _converted(error)
            error = GrpcException(converted.message, converted.code)
        elif isinstance(error, NotImplementedError):
            error = GrpcException(str(error), grpc.StatusCode.UNIMPLEMENTED)
        await super().handle_exception(error, request, context, rpc)


async def _malformed(request: fastapi.Request, error: Exception) -> JSONResponse:
    """Respond without the value of the wrong field, which may be an image."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = () if first["type"] == "json_invalid" else first["loc"]
    field = ".".join(str(part) for part in path if part not in ("body", "InferenceRequest"))
    return await _failed(request, InvalidArgument(f"the request is malformed: {first['msg']}", field=field))


async def _not_implemented(request: fastapi.Request, error: Exception) -> JSONResponse:
    unsupported = CamserveError(str(error) or "the explainer does not support this request")
    unsupported.code = grpc.StatusCode.UNIMPLEMENTED
    return await _failed(request, unsupported)
