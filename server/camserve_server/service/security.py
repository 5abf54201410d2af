"""Who may call: bearer tokens, and the subjects of client certificates."""

from __future__ import annotations

import hashlib
import hmac
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextvars import ContextVar
from typing import Any, get_args

import grpc
import structlog
from grpc_health.v1 import health

from camserve_server.config import Config, TokenConfig
from camserve_server.engine.admission import Caller, Priority
from camserve_server.errors import CamserveError, PermissionDenied, Unauthenticated
from camserve_server.service import status
from camserve_server.service.call import checked_request_id
from camserve_server.service.prometheus import Metrics

PRIORITIES = get_args(Priority)  # from the lowest
ADMIN_SERVICE = "camserve.v1.AdminService"

log = structlog.get_logger()
Context = grpc.aio.ServicerContext[Any, Any]
# gRPC runs the interceptors and the handler of a call in one task.
_token: ContextVar[TokenConfig | None] = ContextVar("token", default=None)


def caller(context: Context) -> str:
    """Who calls: the name of their token, or else of their certificate, or "". To be asked in the call's own task."""
    token = _token.get()
    return token.name if token else next(iter(_subjects(context)), "")


def rights(context: Context, config: Config, asked: Priority | None) -> tuple[Caller, Priority]:
    """Whose the call's rows are, and with what priority. Raises PermissionDenied for one that is too high."""
    token = _token.get()
    most, highest = (token.max_rows_owed, token.priority) if token else (None, "high")
    if asked is None:
        asked = "low" if highest == "low" else "normal"
    if PRIORITIES.index(asked) > PRIORITIES.index(highest):
        raise PermissionDenied(f"{caller(context)} may ask for priority {highest} at most", field="priority")
    return Caller(caller(context), most or config.max_rows_owed_per_caller), asked


class Guard(grpc.aio.ServerInterceptor):
    """Lets those calls through that their token and their certificate allow. Health is for everybody."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self._metrics = metrics
        self._tokens = config.tokens
        self._allowed = config.tls.allowed_subjects if config.tls else None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        service, _, rpc = handler_call_details.method.removeprefix("/").partition("/")
        if handler is None or service == health.SERVICE_NAME:
            return handler
        if self._tokens:
            try:
                token = _known(handler_call_details, self._tokens)
                if service == ADMIN_SERVICE and not token.admin:
                    raise PermissionDenied(f"the token of {token.name} is not one of an admin")
            except CamserveError as error:
                return _refusal(error, rpc, self._metrics)
            _token.set(token)
        return handler if self._allowed is None else _only_for(handler, self._allowed, rpc, self._metrics)


def _known(call: grpc.HandlerCallDetails, tokens: Collection[TokenConfig]) -> TokenConfig:
    """The token that the call brings. Raises Unauthenticated."""
    given = [str(value) for key, value in call.invocation_metadata if key == "authorization"]
    scheme, _, secret = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    if scheme.lower() != "bearer":
        raise Unauthenticated("this server wants a token: send the metadata `authorization: Bearer TOKEN`")
    digest = hashlib.sha256(secret.strip().encode()).hexdigest()
    found = None
    for token in tokens:  # all of them, so that the time tells nothing
        if hmac.compare_digest(token.sha256, digest):
            found = token
    if found is None:
        raise Unauthenticated("the token is unknown to this server")
    return found


def _subjects(context: Context) -> list[str]:
    """What the caller's certificate calls it: its common name first, then its DNS names."""
    shown = context.auth_context()
    names = [*shown.get("x509_common_name", ()), *shown.get("peer_dns", ())]
    return [name.decode(errors="replace") for name in names if name]


def _only_for(
    handler: grpc.RpcMethodHandler[Any, Any], allowed: Collection[str], rpc: str, metrics: Metrics
) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler, for callers with one of those subjects. Only the context of a call, not its details, knows them."""

    async def check(context: Context) -> None:
        if not set(_subjects(context)) & set(allowed):
            error = PermissionDenied("this server is not for the subject of your certificate")
            await _refuse(error, rpc, metrics, context)

    kind = f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}"
    behaviour: Any = getattr(handler, kind)

    async def answer(request: object, context: Context) -> object:
        await check(context)
        return await behaviour(request, context)

    async def answers(request: object, context: Context) -> AsyncIterator[object]:
        await check(context)
        async for response in behaviour(request, context):
            yield response

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    checked: grpc.RpcMethodHandler[Any, Any] = make(
        answers if inspect.isasyncgenfunction(behaviour) else answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return checked


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _refusal(error: CamserveError, rpc: str, metrics: Metrics) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that refuses a call of any kind: of a stream, so that the request is not read before it."""

    async def refuse(_: object, context: Context) -> None:
        await _refuse(error, rpc, metrics, context)

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _refuse(error: CamserveError, rpc: str, metrics: Metrics, context: Context) -> None:
    request_id = checked_request_id("")
    log.info("call", rpc=rpc, request_id=request_id, code=error.code)
    metrics.refused(rpc, error.code)
    await context.abort(status.code(error), error.message, status.trailing_metadata(error, request_id))
