"""The blocking client of a camserve server."""

from __future__ import annotations

import contextvars
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import grpc
import grpc.experimental

from camserve import batches, environment, errors, request_messages
from camserve.connection import RETRY_DELAYS_S, BlockingConnection
from camserve.method_docs import document_method

__all__ = ["Client"]

P = ParamSpec("P")
ResultT = TypeVar("ResultT")
EventT = TypeVar("EventT")


def _unary(
    build_call: Callable[P, request_messages.PreparedCall[ResultT]],
) -> Callable[Concatenate[Client, P], ResultT]:
    """Return a method that sends one request and returns the result."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        return self._run(build_call(*args, **kwargs))

    document_method(method, build_call)
    return method


def _stream(
    build_call: Callable[P, request_messages.StreamableCall[ResultT, EventT]],
) -> Callable[Concatenate[Client, P], Generator[EventT, None, None]]:
    """Return a method that sends one request and yields its events."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[EventT, None, None]:
        return self._run_stream(build_call(*args, **kwargs).as_stream())

    document_method(method, build_call, Iterator, streams=True)
    return method


def _many(
    build_requests: Callable[P, batches.ConcurrentRequests[ResultT]],
) -> Callable[Concatenate[Client, P], Generator[ResultT, None, None]]:
    """Return a method that sends many requests and yields their results."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[ResultT, None, None]:
        return self._run_many(build_requests(*args, **kwargs))

    document_method(method, build_requests, Iterator)
    return method


class Client(BlockingConnection):
    """Blocking client of a camserve server.

    The client connects when it is first used. Threads may share it. Close it when it is no longer needed, preferably
    with a `with` statement. If a call is interrupted, for instance by Ctrl-C, the client also cancels it on the server.

    Args:
        address: Address of the server, "host:port", or another gRPC name such as "dns:///host:port". If the name
            resolves to several servers, calls are distributed over those that are ready, by their load.
        timeout: Timeout of a call in seconds, retries included. None means no timeout. The default is 30, except for
            each request of `explain_many` and `evaluate_many`, which have no timeout by default.
        tls: True to use TLS with the certificate authorities that gRPC trusts by default.
        ca: Certificate authorities to trust instead: a PEM file, or its content as bytes. Enables TLS.
        certificate: Certificate chain of the client: a PEM file, or its content as bytes. Requires `key`, enables TLS.
        key: Private key of `certificate`, unencrypted: a PEM file, or its content as bytes.
        token: Bearer token that is sent with each call. It requires TLS, except for loopback addresses.
        health_checks: False to call servers without asking them whether they are ready. By default, the client watches
            their `grpc.health.v1.Health`, unless it is refused.

    Raises:
        InvalidArgument: The token is malformed or would be sent without TLS, or a certificate or key is invalid.
        OSError: A PEM file cannot be read.
    """

    _extra_options: ClassVar[list[tuple[str, Any]]] = [
        # By default, a stream of grpcio 1.76 never ends if its connection is lost before its start and gRPC retries it.
        (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)
    ]

    explain = _unary(request_messages.explain)
    explain_stream = _stream(request_messages.explain)
    explain_many = _many(batches.explain_many)
    evaluate = _unary(request_messages.evaluate)
    evaluate_stream = _stream(request_messages.evaluate)
    evaluate_many = _many(batches.evaluate_many)
    replay = _unary(request_messages.replay)
    replay_stream = _stream(request_messages.replay)
    models = _unary(request_messages.list_models)
    methods = _unary(request_messages.list_methods)
    metrics = _unary(request_messages.list_metrics)

    def __repr__(self) -> str:
        return f"Client({self.address!r})"

    def _run(
        self,
        call: request_messages.PreparedCall[ResultT],
        *,
        one_of_many: bool = False,
        started: Callable[[Any], object] = lambda rpc: None,
    ) -> ResultT:
        """Send a request and return the result, which is the last of its events."""
        result: ResultT | None = None
        for event in self._run_stream(call, one_of_many=one_of_many, started=started):
            result = event
        if result is None:
            raise errors.InternalError("the response ended without a result")
        return result

    def _run_many(self, many: batches.ConcurrentRequests[ResultT]) -> Generator[ResultT, None, None]:
        in_flight: set[Any] = set()
        left = threading.Event()  # the caller does not want further results
        # A function for each finished request. It returns the result in a list, or [] if the request is sent again.
        finished: SimpleQueue[Callable[[], list[ResultT]]] = SimpleQueue()

        def start(request: batches.PendingRequest[ResultT]) -> None:
            try:
                call = request.prepare()
            except (errors.CamserveError, OSError) as error:
                failure = error  # Python deletes the variable of an except clause at the end of the clause.
                finished.put(lambda: [request.to_result(failure)])
                return
            # A daemon, so that a caller that is interrupted can end at once.
            run = contextvars.copy_context().run  # which contains the current OpenTelemetry span
            threading.Thread(target=run, args=(send, request, call), name="camserve-call", daemon=True).start()

        def send(request: batches.PendingRequest[ResultT], call: request_messages.PreparedCall[Any]) -> None:
            outcome: Future[Any] = Future()
            try:
                outcome.set_result(self._run(call, one_of_many=True, started=register))
            except BaseException as error:
                outcome.set_exception(error)
            finished.put(lambda: finish(request, outcome))

        def register(rpc: Any) -> None:
            in_flight.add(rpc)
            rpc.add_done_callback(in_flight.discard)
            if left.is_set():
                rpc.cancel()

        def finish(request: batches.PendingRequest[ResultT], outcome: Future[Any]) -> list[ResultT]:
            try:
                return [request.to_result(outcome.result())]
            except errors.CamserveError as error:
                if not (retry := request.retry(error)):
                    return [request.to_result(error)]
            time.sleep(retry[0])  # The server is busy, so no other request starts during the wait.
            start(retry[1])
            return []

        try:
            outstanding = 0
            for request in itertools.islice(many.requests, many.in_flight):
                start(request)
                outstanding += 1
            while outstanding:
                for result in finished.get()():
                    outstanding -= 1
                    # Start the next request before the caller processes the result, which may take long.
                    for request in itertools.islice(many.requests, 1):
                        start(request)
                        outstanding += 1
                    yield result
        finally:
            left.set()
            for rpc in [*in_flight]:
                rpc.cancel()

    def _run_stream(
        self,
        call: request_messages.PreparedCall[Any],
        *,
        one_of_many: bool = False,
        started: Callable[[Any], object] = lambda rpc: None,
    ) -> Generator[Any, None, None]:
        """Send a request and yield its events. The event of a unary call is its result.

        Args:
            call: The request.
            one_of_many: The caller repeats calls that a busy server refuses.
            started: Receives the call of gRPC when it has been started.
        """
        options = self._call_options(call, one_of_many=one_of_many)
        sent = self._to_send(call, options)
        delays_s = iter(RETRY_DELAYS_S)
        while True:
            channels = self._channels()
            rpc_method, rpc = getattr(channels.stubs[one_of_many], sent.rpc), None
            # A future, because the blocking form does not cancel the call on the server when it is interrupted.
            unary = getattr(rpc_method, "future", None)
            try:
                rpc = (unary or rpc_method)(sent.request, **options)
                with environment.calls:
                    started(rpc)
                    for message in [rpc.result()] if unary else rpc:
                        event = sent.parse_response(message)
                        if event is not None:
                            yield event
                return
            except (grpc.RpcError, grpc.FutureCancelledError, ValueError, GeneratorExit) as error:
                if rpc is not None and (self._closed or not isinstance(error, ValueError)):  # of a signal handler
                    _read_to_end(rpc)  # the caller leaves the stream early, or another thread has cancelled the call
                if isinstance(error, grpc.RpcError):
                    self._raise_or_wait(channels, error, call, delays_s)
                elif isinstance(error, GeneratorExit) or not self._closed:
                    raise
                else:
                    raise errors.Cancelled("the client was closed while the call was in flight") from error
            finally:
                if rpc is not None:
                    rpc.cancel()  # This has no effect on a call that has finished.


def _read_to_end(rpc: Any) -> None:
    """Cancel a call, and read the events that are left.

    A stream of a single thread keeps its memory and its connection until its last event is read, even if the call is
    cancelled and the channel is closed. After a cancellation, gRPC offers no public way to read the other events. A
    signal may have interrupted the reading of an event, which is then lost, so do not call this function after one.
    """
    rpc.cancel()  # without effect on a call that has finished, or whose response is malformed
    while rpc.cancelled() and hasattr(rpc, "_consume_next_event") and rpc._state.due and not environment.calls.problem:
        rpc._consume_next_event()
