"""Handlers of the RPCs in a gRPC proxy of Serve.

Serve's own handlers pass a call on to a replica. The handlers around them add what Serve omits: the deadline of the
caller, the details of errors, and Health without a replica. Messages are not parsed here, because a proxy has one
thread, and a message with many small fields takes seconds.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from camserve.v1 import explain_pb2 as pb
from camserve_ray.serving.services import CHECK, EXPLAIN, FROM_REPLICA, INFERENCE, NAME, RPCS, TIMEOUT_MS, WATCH
from camserve_server.errors import Unavailable
from camserve_server.service import status
from camserve_server.service.call import MAX_REQUEST_ID, checked_request_id
from camserve_server.service.load_reports import reports
from camserve_server.service.load_reports.orca_pb2 import LoadReport

# Seconds that a replica may take to respond to a health check. Calls without a replica wait in the proxy.
_CHECK_S = 5.0
# Seconds between the checks for Watch. Each sends the state again, because gRPC closes connections whose clients send
# pings and get no data, and Serve offers no option for that.
_WATCH_S = 10.0
# Metadata of callers that would have a meaning for Serve or for a replica.
_RESERVED = ("application", "multiplexed_model_id", "request_id", "session_id", TIMEOUT_MS)
# The codes that Serve sets if the caller cancels a call or its deadline passes.
_CODES_OF_CALLERS = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
# The key of Serve's identifier of a call.
_ID_OF_SERVE = "request_id"
_REPORTS = f"/{reports.SERVICE}/StreamCoreMetrics"
_SERVICES = ("", EXPLAIN, INFERENCE)

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

    Serve replaces the values of `_method_handlers` by its own, as it does in the handlers of generated stubs.
    """

    def __init__(self) -> None:
        self._method_handlers: dict[str, Any] = {
            rpc.path: (grpc.unary_stream_rpc_method_handler if rpc.streaming else grpc.unary_unary_rpc_method_handler)(
                _replaced
            )
            for rpc in (*RPCS, WATCH)
        }

        # The time and the value of the last state of each service, and the questions that are not answered yet.
        self._states: dict[str, tuple[float, int]] = {}
        self._questions: dict[str, asyncio.Task[int]] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a call; None if there is no such RPC."""
        path = handler_call_details.method
        if path == WATCH.path:
            return grpc.unary_stream_rpc_method_handler(self._watch)
        if path == _REPORTS:
            return grpc.unary_stream_rpc_method_handler(_reports)
        if path == CHECK.path:
            return grpc.unary_unary_rpc_method_handler(self._check)
        of_serve = self._method_handlers.get(path)
        if of_serve is None:
            return None
        if of_serve.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_streaming(path, of_serve.unary_stream))
        return grpc.unary_unary_rpc_method_handler(_unary(path, of_serve.unary_unary))

    async def _check(self, request: bytes, context: Context) -> bytes:
        """Return the state of a service: that in a replica, or not ready if no replica responds."""
        service = HealthCheckRequest.FromString(request).service
        if service not in _SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {service!r}")
        return _encoded(await self._state(service))

    async def _watch(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        """Yield the state of a service, now and every few seconds."""
        service = HealthCheckRequest.FromString(request).service
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
        """Ask a replica for the state of a service, a value of HealthCheckResponse.ServingStatus."""
        recorded = _Recorded(_NoCaller())
        state: int = HealthCheckResponse.NOT_SERVING
        try:
            check = self._method_handlers[CHECK.path].unary_unary
            request = HealthCheckRequest(service=service).SerializeToString()
            response = await asyncio.wait_for(check(request, recorded), _CHECK_S)
        except TimeoutError:
            pass
        else:
            if recorded.code() in _CODES_OF_CALLERS:  # says nothing about the replicas
                return state
            if not recorded.failed():
                state = HealthCheckResponse.FromString(response).status
        self._states[service] = (time.monotonic(), state)
        return state


async def _reports(request: bytes, context: Context) -> AsyncIterator[bytes]:
    """Yield the same load report every few seconds. All proxies use all replicas, so clients need not prefer one."""
    while True:
        yield LoadReport(rps_fractional=1, application_utilization=reports.utilization(0)).SerializeToString()
        await asyncio.sleep(_WATCH_S)


def _replaced(request: bytes, context: Context) -> Any:
    raise NotImplementedError("Serve replaces this function")


def _unary(path: str, of_serve: Callable[[bytes, Any], Any]) -> Callable[[bytes, Context], Any]:
    """Return the handler around Serve's handler of an RPC with one response."""

    async def handler(request: bytes, context: Context) -> bytes:
        recorded = _Recorded(context)
        response: bytes = await of_serve(request, recorded)
        if recorded.failed():
            await _abort(path, request, context, recorded)
        return response

    return handler


def _streaming(path: str, of_serve: Callable[[bytes, Any], Any]) -> Callable[[bytes, Context], Any]:
    """Return the handler around Serve's handler of an RPC with several responses."""

    async def handler(request: bytes, context: Context) -> AsyncIterator[bytes]:
        recorded = _Recorded(context)
        async for response in of_serve(request, recorded):
            if not recorded.failed():  # the message that carries the status of a failed call is empty
                yield response
        if recorded.failed():
            await _abort(path, request, context, recorded)

    return handler


def _encoded(state: int) -> bytes:
    data: bytes = HealthCheckResponse(status=state).SerializeToString()
    return data


class _NoCaller:
    """The context of a call that the proxy itself makes, with what Serve reads from a context."""

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        """Return no metadata."""
        return ()

    def time_remaining(self) -> None:
        """Return no deadline."""

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


class _Recorded:
    """The context that Serve's handlers get. It records the status, and the handler around them ends the call.

    Args:
        context: The context of the call.
    """

    def __init__(self, context: Context | _NoCaller) -> None:
        self._context = context
        self._code: Any = 0
        self._details = ""
        self._trailing: Sequence[tuple[str, str | bytes]] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> list[tuple[str, Any]]:
        """Return the metadata of the caller, with the name of the application and the time until the deadline."""
        given = self._context.invocation_metadata() or ()
        metadata = [("application", NAME), *((key, value) for key, value in given if key not in _RESERVED)]
        left = self._context.time_remaining()
        return metadata if left is None else [*metadata, (TIMEOUT_MS, str(max(0, int(1e3 * left))))]

    def failed(self) -> bool:
        """Return True if the call has another status than OK."""
        return self._code not in (0, grpc.StatusCode.OK)

    def code(self) -> Any:
        """Return the code, or 0 for none."""
        return self._code

    def details(self) -> str:
        """Return the message of the status."""
        return self._details

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """Return the metadata that follow the response."""
        return self._trailing

    def set_code(self, code: Any) -> None:
        """Record the code."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Record the message of the status."""
        self._details = details

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Record the metadata that follow the response."""
        self._trailing = metadata


async def _abort(path: str, request: bytes, context: Context, recorded: _Recorded) -> None:
    """End a call with the recorded status.

    A status that does not come from the replica comes from Serve: the replica has been lost, or there is none. The
    caller may then repeat the call.
    """
    trailing = {key: value for key, value in recorded.trailing_metadata() if key != _ID_OF_SERVE}
    from_replica = trailing.pop(FROM_REPLICA, None) is not None
    if from_replica or recorded.code() in _CODES_OF_CALLERS:
        await context.abort(recorded.code(), recorded.details(), tuple(trailing.items()))
    error = Unavailable(
        "the replica that ran the request has ended, or there is none; try again "
        f"(Ray Serve: {recorded.code().name}, {_first_line(recorded.details())})",
        reason="REPLICA_LOST",
        retry_after_s=1.0,
    )
    details = status.trailing_metadata(error, _request_id(path, request), context.time_remaining())
    await context.abort(status.code(error), error.message, details)


def _request_id(path: str, request: bytes) -> str:
    """Return the identifier that the caller has given to a request, or a new one."""
    kinds: dict[str, Any] = {
        f"/{EXPLAIN}/Explain": pb.ExplainRequest,
        f"/{EXPLAIN}/ExplainStream": pb.ExplainStreamRequest,
        f"/{EXPLAIN}/Evaluate": pb.EvaluateRequest,
        f"/{EXPLAIN}/EvaluateStream": pb.EvaluateStreamRequest,
    }
    try:
        message = kinds[path].FromString(request)
    except (KeyError, DecodeError):
        message = None
    message = getattr(message, "request", message)
    request_id = getattr(message, "request_id", "")
    return checked_request_id(request_id if len(request_id) <= MAX_REQUEST_ID and request_id.isprintable() else "")


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
