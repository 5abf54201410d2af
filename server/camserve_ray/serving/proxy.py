"""Handlers of the RPCs in a gRPC proxy of Serve.

Serve tells its proxies which replicas there are. The handlers pass calls on to the servers of the replicas, and answer
Health. A proxy has one thread, and to parse a message with many small fields takes seconds. The messages of calls are
therefore parsed only for the identifier in an error of the proxy itself, within the limits of the server.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from camserve.addresses import is_loopback
from camserve.v1 import explain_pb2 as pb
from camserve_ray.serving.connections import Connection, Connections
from camserve_ray.serving.services import CHECK, EXPLAIN, HOLD, INFERENCE, NAME, RPCS, WATCH, Rpc
from camserve_server.errors import CamserveError, PermissionDenied, Unavailable
from camserve_server.service import status
from camserve_server.service.bounds import parse
from camserve_server.service.call import MAX_REQUEST_ID, checked_request_id
from camserve_server.service.load_reports import reports
from camserve_server.service.load_reports.orca_pb2 import LoadReport

# Seconds that replicas may take to respond to a health check, and after which a further one is asked. A replica whose
# node has lost its power does not respond, and Serve notices the loss later.
_CHECK_S = 5.0
_NEXT_S = 1.0
# Seconds before another attempt if a replica has ended.
_RETRY_S = 0.1
# Seconds before another call of `Hold` if one has failed.
_HOLD_RETRY_S = 1.0
# Seconds between the checks for Watch. Each sends the state again, because gRPC closes connections whose clients send
# pings and get no data, and Serve offers no option for that.
_WATCH_S = 10.0
# The codes by which gRPC reports a connection that has ended, and the code of a replica for a wrong secret: a new
# replica can have the port of an old one. The server of a replica adds details to its own errors.
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.PERMISSION_DENIED)
_DETAILS = "grpc-status-details-bin"
_REPORTS = f"/{reports.SERVICE}/StreamCoreMetrics"
_SERVICES = ("", EXPLAIN, INFERENCE)

log = logging.getLogger("ray.serve")  # the log of Serve in this process

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"


def add_services(servicer: Any, server: Any) -> None:
    """Add the services to the gRPC server of a proxy. Serve calls this function by its name in `grpc_options`.

    Args:
        servicer: Is not used: Serve replaces the functions of handlers.
        server: The server of the proxy.
    """
    server.add_generic_rpc_handlers((_Services(),))


class _Services(grpc.GenericRpcHandler):
    """The handlers of all RPCs.

    Serve replaces the values of `_method_handlers` by its own, as it does in the handlers of generated stubs. Only that
    of `HOLD` is used. Reflection names the services of the keys.
    """

    def __init__(self) -> None:
        paths = [each.path for each in (*RPCS, CHECK, WATCH, HOLD)]
        self._method_handlers: dict[str, Any] = dict.fromkeys(paths, grpc.unary_unary_rpc_method_handler(_replaced))
        self._handlers: dict[str, Any] = {
            **{rpc.path: self._forwarding(rpc) for rpc in RPCS},
            CHECK.path: grpc.unary_unary_rpc_method_handler(self._check),
            WATCH.path: grpc.unary_stream_rpc_method_handler(self._watch),
            _REPORTS: grpc.unary_stream_rpc_method_handler(_reports),
        }
        self._connections = Connections()
        self._running = 0
        self._holding: asyncio.Task[None] | None = None
        # The time and the value of the last state of each service, and the questions that are not answered yet.
        self._states: dict[str, tuple[float, int]] = {}
        self._questions: dict[str, asyncio.Task[int]] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a call; None if there is no such RPC."""
        return self._handlers.get(handler_call_details.method)

    # ---- calls that are passed on ------------------------------------------------------------------------------------

    def _forwarding(self, rpc: Rpc) -> Any:
        """Return the handler that passes calls on."""

        async def unary(request: bytes, context: Context) -> bytes:
            with self._counted():
                connection = await self._connections.pick()
                with _runs_on(connection):
                    try:
                        _check_peer(connection, context)
                        response: bytes = await _sent(connection, rpc, request, context)
                        return response
                    except grpc.aio.AioRpcError as error:
                        await _abort(rpc, request, context, error)
                    except CamserveError as error:
                        await _abort_with(error, rpc, request, context)
            raise AssertionError("abort raises")

        async def stream(request: bytes, context: Context) -> AsyncIterator[bytes]:
            with self._counted():
                connection = await self._connections.pick()
                with _runs_on(connection):
                    try:
                        _check_peer(connection, context)
                        call = _sent(connection, rpc, request, context)
                        try:
                            async for response in call:
                                yield response
                        finally:
                            call.cancel()  # has no effect on a call that has ended
                    except grpc.aio.AioRpcError as error:
                        await _abort(rpc, request, context, error)
                    except CamserveError as error:
                        await _abort_with(error, rpc, request, context)

        if rpc.streaming:
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a call, and let Serve count at least one while there are any."""
        self._running += 1
        if self._holding is None or self._holding.done():
            self._holding = asyncio.create_task(self._hold())
        try:
            yield
        finally:
            self._running -= 1

    async def _hold(self) -> None:
        """Keep a call that Serve counts while this proxy passes on calls, of which Serve does not know.

        Serve ends the proxy of a node that has no replica any more when the proxy has no calls, and Ray may then remove
        the node.
        """
        while self._running:
            context = _Context()
            try:
                await self._method_handlers[HOLD.path].unary_unary(b"", context)
            except (Exception, asyncio.CancelledError) as error:  # the task must not end while calls run
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                    raise  # this task itself is cancelled, not only the call in Serve
                context.set_code(grpc.StatusCode.INTERNAL)
                log.warning("Serve could not call Hold: %s", _first_line(repr(error)))
            if context.code() not in (0, grpc.StatusCode.OK):
                await asyncio.sleep(_HOLD_RETRY_S)

    # ---- Health ------------------------------------------------------------------------------------------------------

    async def _check(self, request: bytes, context: Context) -> bytes:
        """Return the state of a service: that in a replica, or not ready if no replica responds."""
        service = await _service(CHECK, request, context)
        if service not in _SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {service!r}")
        return _encoded(await self._state(service))

    async def _watch(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        """Yield the state of a service, now and every few seconds."""
        service = await _service(WATCH, request, context)
        while True:
            asked, state = self._states.get(service, (-math.inf, HealthCheckResponse.SERVICE_UNKNOWN))
            if service in _SERVICES and time.monotonic() - asked > _WATCH_S / 2:
                state = await self._state(service)
            yield _encoded(state)
            await asyncio.sleep(_WATCH_S)

    async def _state(self, service: str) -> int:
        """Return the state of a service. Callers that ask at the same time share one question.

        The question is a task of its own, so it continues for the other callers if one of them cancels its call.
        """
        question = self._questions.get(service)
        if question is None:
            question = asyncio.create_task(self._ask(service))
            self._questions[service] = question
            question.add_done_callback(lambda _: self._questions.pop(service))
        return await asyncio.shield(question)

    async def _ask(self, service: str) -> int:
        """Ask replicas for the state of a service, a value of HealthCheckResponse.ServingStatus, until one responds."""
        state: int = HealthCheckResponse.NOT_SERVING
        with suppress(TimeoutError):
            async with asyncio.timeout(_CHECK_S):
                state = await self._response(service)
        self._states[service] = (time.monotonic(), state)
        return state

    async def _response(self, service: str) -> int:
        """Return the first response. Meanwhile, one replica after another is asked."""
        asked: set[asyncio.Task[int | None]] = set()
        try:
            while True:
                asked.add(asyncio.create_task(self._response_of_one(service)))
                done, asked = await asyncio.wait(asked, timeout=_NEXT_S, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    if (state := each.result()) is not None:
                        return state
                if done:
                    await asyncio.sleep(_RETRY_S)
        finally:
            for each in asked:
                each.cancel()

    async def _response_of_one(self, service: str) -> int | None:
        """Ask a replica for the state of a service. Returns None if the replica has ended."""
        request = HealthCheckRequest(service=service).SerializeToString()
        connection = await self._connections.pick()
        with _runs_on(connection), suppress(grpc.aio.AioRpcError):
            response = await connection.call(CHECK.path, streaming=False, request=request, given=(), timeout=_CHECK_S)
            return int(HealthCheckResponse.FromString(response).status)
        return None


async def _reports(request: bytes, context: Context) -> AsyncIterator[bytes]:
    """Yield the same load report every few seconds. All proxies use all replicas, so clients need not prefer one."""
    while True:
        yield LoadReport(rps_fractional=1, application_utilization=reports.utilization(0)).SerializeToString()
        await asyncio.sleep(_WATCH_S)


async def _service(rpc: Rpc, request: bytes, context: Context) -> str:
    """Return the service that a request of Health names. Ends the call if the request is not valid."""
    try:
        message: Any = parse(HealthCheckRequest, request)
    except CamserveError as error:
        await _abort_with(error, rpc, request, context)
    return str(message.service)


def _replaced(request: bytes, context: Context) -> Any:
    raise NotImplementedError("Serve replaces this function")


@contextmanager
def _runs_on(connection: Connection) -> Iterator[None]:
    connection.running += 1
    try:
        yield
    finally:
        connection.running -= 1


def _sent(connection: Connection, rpc: Rpc, request: bytes, context: Context) -> Any:
    """Send the request of a caller with its metadata and its deadline."""
    return connection.call(
        rpc.path,
        streaming=rpc.streaming,
        request=request,
        given=context.invocation_metadata() or (),
        timeout=context.time_remaining(),
    )


def _check_peer(connection: Connection, context: Context) -> None:
    """Refuse callers on other machines if `listen` is a loopback address. Serve listens on all addresses."""
    if connection.endpoint.local_callers_only and not is_loopback(unquote(context.peer())):
        raise PermissionDenied(
            "the call comes from another machine, and listen of the server is a loopback address; set "
            'listen = "0.0.0.0:PORT" and insecure = true if you trust the network'
        )


async def _abort(rpc: Rpc, request: bytes, context: Context, error: grpc.aio.AioRpcError) -> None:
    """End a call with the status from the replica, or with another one if the replica has been lost."""
    trailing = tuple(error.trailing_metadata() or ())
    if error.code() in _LOST and all(key != _DETAILS for key, _ in trailing):
        lost = Unavailable(
            "the replica that ran the request has ended; try again "
            f"({error.code().name}, {_first_line(error.details() or '')})",
            reason="REPLICA_LOST",
            retry_after_s=1.0,
        )
        await _abort_with(lost, rpc, request, context)
    await context.abort(error.code(), error.details() or "", trailing)


async def _abort_with(error: CamserveError, rpc: Rpc, request: bytes, context: Context) -> None:
    details = status.trailing_metadata(error, _request_id(rpc, request), context.time_remaining())
    await context.abort(status.code(error), error.message, details)


def _request_id(rpc: Rpc, request: bytes) -> str:
    """Return the identifier that the caller has given to a request, or a new one."""
    kinds: dict[str, Any] = {
        f"/{EXPLAIN}/Explain": pb.ExplainRequest,
        f"/{EXPLAIN}/ExplainStream": pb.ExplainStreamRequest,
        f"/{EXPLAIN}/Evaluate": pb.EvaluateRequest,
        f"/{EXPLAIN}/EvaluateStream": pb.EvaluateStreamRequest,
    }
    try:
        message = parse(kinds[rpc.path], request)
    except (KeyError, CamserveError):
        message = None
    message = getattr(message, "request", message)
    request_id = getattr(message, "request_id", "")
    return checked_request_id(request_id if len(request_id) <= MAX_REQUEST_ID and request_id.isprintable() else "")


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _encoded(state: int) -> bytes:
    data: bytes = HealthCheckResponse(status=state).SerializeToString()
    return data


class _Context:
    """The context of a call that the proxy itself makes by means of Serve, with what Serve uses of a context."""

    def __init__(self) -> None:
        self._code: Any = 0
        self._details = ""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the name of the application."""
        return (("application", NAME),)

    def auth_context(self) -> dict[str, Any]:
        """Return no properties."""
        return {}

    def peer(self) -> str:
        """Return no address."""
        return ""

    def peer_identities(self) -> None:
        """Return no identity."""

    def peer_identity_key(self) -> None:
        """Return no key."""

    def code(self) -> Any:
        """Return the code, or 0 for none."""
        return self._code

    def details(self) -> str:
        """Return the message of the status."""
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        """Return no metadata."""
        return ()

    def set_code(self, code: Any) -> None:
        """Record the code."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Record the message of the status."""
        self._details = details

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Ignore the metadata that Serve adds."""
