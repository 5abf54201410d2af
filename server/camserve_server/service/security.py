"""Authentication and rights of callers, by bearer tokens and by the subjects of client certificates."""

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
from camserve_server.service.load_reports.reports import SERVICE as LOAD_REPORTS

PRIORITIES = get_args(Priority)  # in ascending order
ADMIN_SERVICE = "camserve.v1.AdminService"

log = structlog.get_logger()
Context = grpc.aio.ServicerContext[Any, Any]
CountRefusal = Callable[[str, str], Awaitable[None]]
# gRPC runs the interceptors and the handler of a call in the same task.
_token: ContextVar[TokenConfig | None] = ContextVar("token", default=None)
_known_subject: ContextVar[str | None] = ContextVar("known_subject", default=None)  # that gRPC need not be asked for


def caller(context: Context) -> str:
    """Return the name of the caller: that of the token, or else of the client certificate, or an empty string.

    Call it in the task of the call.

    Args:
        context: The context of the call.
    """
    return token_name() or subject(context)


def subject(context: Context) -> str:
    """Return the subject of the client certificate; empty if there is none. Call it in the task of the call."""
    known = _known_subject.get()
    return next(iter(_subjects(context)), "") if known is None else known


def token_name() -> str:
    """Return the name of the token of the current call; empty if it has none. Call it in the task of the call."""
    token = _token.get()
    return token.name if token else ""


def identity(context: Context) -> tuple[str, str, str]:
    """Return what identifies the caller: name and hash of its token, and the subject of its client certificate.

    Each is empty if the caller has none. Call it in the task of the call.

    Args:
        context: The context of the call.
    """
    token = _token.get()
    return (token.name, token.sha256, subject(context)) if token else ("", "", subject(context))


def trust(config: Config, token: str, subject: str) -> None:
    """Take over the identity of a caller that a front end has checked. Call it in the task of the call.

    Args:
        config: The configuration of the server.
        token: The name of the caller's token; empty if it has none.
        subject: The subject of the caller's certificate; empty if it has none.
    """
    _token.set(next((each for each in config.tokens if each.name == token), None))
    _known_subject.set(subject)


def rights(context: Context, config: Config, requested: Priority | None) -> tuple[Caller, Priority]:
    """Return the caller with its quota, and the priority of its request.

    Call it in the task of the call.

    Args:
        context: The context of the call.
        config: The configuration of the server.
        requested: The requested priority; None for the default.

    Raises:
        PermissionDenied: The token does not permit the requested priority.
    """
    token = _token.get()
    quota, highest = (token.max_rows_owed, token.priority) if token else (None, "high")
    if requested is None:
        requested = "low" if highest == "low" else "normal"
    if PRIORITIES.index(requested) > PRIORITIES.index(highest):
        raise PermissionDenied(
            f"the priority is {requested}; the token of {caller(context)} permits at most {highest}", field="priority"
        )
    return Caller(caller(context), quota or config.max_rows_owed_per_caller), requested


class Guard(grpc.aio.ServerInterceptor):
    """Refuses calls whose token or certificate is not allowed. Health and load reports need neither.

    gRPC itself reads these two, without the credentials of calls.

    Args:
        config: The configuration, with the tokens and the allowed subjects.
        count: Counts a refused call: the name of its RPC and of its status code.
    """

    def __init__(self, config: Config, count: CountRefusal) -> None:
        self._count = count
        self._tokens = config.tokens
        self._allowed = config.tls.allowed_subjects if config.tls else None
        self._certificates = config.tls is not None and config.tls.client_ca is not None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler of a call, or one that refuses the call."""
        handler = await continuation(handler_call_details)
        service, _, rpc = handler_call_details.method.removeprefix("/").partition("/")
        if handler is None or service in (health.SERVICE_NAME, LOAD_REPORTS):
            return handler
        if not self._certificates:
            _known_subject.set("")
        if self._tokens:
            try:
                token = _authenticate(handler_call_details, self._tokens)
                if service == ADMIN_SERVICE and not token.admin:
                    raise PermissionDenied(
                        f"the token of {token.name} is not an admin token; AdminService needs one with admin = true"
                    )
            except CamserveError as error:
                return _refusal(error, rpc, self._count)
            _token.set(token)
        return handler if self._allowed is None else _only_for(handler, self._allowed, rpc, self._count)


def _authenticate(call: grpc.HandlerCallDetails, tokens: Collection[TokenConfig]) -> TokenConfig:
    """Return the configured token that the call sent. Raises Unauthenticated."""
    values = [str(value) for key, value in call.invocation_metadata if key == "authorization"]
    scheme, _, secret = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    if scheme.lower() != "bearer":
        raise Unauthenticated("the call has no single bearer token; send the metadata `authorization: Bearer TOKEN`")
    digest = hashlib.sha256(secret.strip().encode()).hexdigest()
    match = None
    for token in tokens:  # comparing with every token keeps the time independent of the result
        if hmac.compare_digest(token.sha256, digest):
            match = token
    if match is None:
        raise Unauthenticated("the token is unknown to this server; check the token and the address")
    return match


def _subjects(context: Context) -> list[str]:
    """Return the subjects of the client certificate: its common name first, then its DNS names."""
    auth = context.auth_context()
    names = [*auth.get("x509_common_name", ()), *auth.get("peer_dns", ())]
    return [name.decode(errors="replace") for name in names if name]


def _only_for(
    handler: grpc.RpcMethodHandler[Any, Any], allowed: Collection[str], rpc: str, count: CountRefusal
) -> grpc.RpcMethodHandler[Any, Any]:
    """Restrict a handler to callers with an allowed subject, which only the context of a call contains."""

    async def check(context: Context) -> None:
        if not set(_subjects(context)) & set(allowed):
            error = PermissionDenied("the subject of the client certificate is not in allowed_subjects of this server")
            await _refuse(error, rpc, count, context)

    call_type = f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}"
    respond: Any = getattr(handler, call_type)

    async def checked_unary(request: object, context: Context) -> object:
        await check(context)
        return await respond(request, context)

    async def checked_stream(request: object, context: Context) -> AsyncIterator[object]:
        await check(context)
        async for response in respond(request, context):
            yield response

    make = getattr(grpc, f"{call_type}_rpc_method_handler")
    checked: grpc.RpcMethodHandler[Any, Any] = make(
        checked_stream if inspect.isasyncgenfunction(respond) else checked_unary,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return checked


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _refusal(error: CamserveError, rpc: str, count: CountRefusal) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler that refuses a call. It is a streaming one so that gRPC does not read the request first."""

    async def refuse(_: object, context: Context) -> None:
        await _refuse(error, rpc, count, context)

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _refuse(error: CamserveError, rpc: str, count: CountRefusal, context: Context) -> None:
    request_id = checked_request_id("")
    log.info("call", rpc=rpc, request_id=request_id, code=error.code)
    await count(rpc, error.code)
    await context.abort(status.code(error), error.message, status.trailing_metadata(error, request_id))
