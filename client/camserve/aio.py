"""Client for asyncio: `camserve.aio.Client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Hashable
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import grpc

from camserve import batches, environment, errors, request_messages
from camserve.connection import RETRY_DELAYS_S, Connection
from camserve.method_docs import document_method

__all__ = ["Client"]

P = ParamSpec("P")
ResultT = TypeVar("ResultT")
EventT = TypeVar("EventT")

# Building a request reads files and copies pixels, so it runs on a thread in order not to block the event loop.


def _unary(
    build_call: Callable[P, request_messages.PreparedCall[ResultT]],
) -> Callable[Concatenate[Client, P], Coroutine[Any, Any, ResultT]]:
    """Return a coroutine method that sends one request and returns the result."""

    async def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        _running_loop()
        return await self._run(await asyncio.to_thread(build_call, *args, **kwargs))

    document_method(method, build_call, Awaitable)
    return method


def _stream(
    build_call: Callable[P, request_messages.StreamableCall[ResultT, EventT]],
) -> Callable[Concatenate[Client, P], AsyncGenerator[EventT, None]]:
    """Return an asynchronous generator method that sends one request and yields its events."""

    async def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[EventT, None]:
        _running_loop()
        call = await asyncio.to_thread(build_call, *args, **kwargs)
        async for event in self._run_stream(call.as_stream()):
            yield event

    document_method(method, build_call, AsyncIterator, streams=True)
    return method


def _many(
    build_requests: Callable[P, batches.ConcurrentRequests[ResultT]],
) -> Callable[Concatenate[Client, P], AsyncGenerator[ResultT, None]]:
    """Return an asynchronous generator method that sends many requests and yields their results."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[ResultT, None]:
        return self._run_many(build_requests(*args, **kwargs))

    document_method(method, build_requests, AsyncIterator)
    return method


class Client(Connection):
    """Client of a camserve server for asyncio.

    The client connects when it is first used. It may be created outside of an event loop and used in several, one after
    another; each event loop has connections of its own. Close it when it is no longer needed, preferably with an `async
    with` statement. Cancelling a task that awaits a call also cancels the call on the server. Wrap a stream that you
    may leave early in `contextlib.aclosing`; otherwise its call ends only when Python deletes the iterator.

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

    _grpc: ClassVar[Any] = grpc.aio

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

    async def close(self) -> None:
        """Close the connection and cancel all calls in flight. The client cannot be used afterwards."""
        here = _running_loop()
        for loop, channel in self._take_channels():
            if loop is here:
                await channel.close()
            elif loop.is_running():  # in another thread
                # Its calls end with the channel. The loop may then end, and cancel this, before it is over.
                await asyncio.wait([asyncio.wrap_future(asyncio.run_coroutine_threadsafe(channel.close(), loop))])

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"aio.Client({self.address!r})"

    def _owner(self) -> Hashable:
        """Return the running event loop, and forget the channels of those that are closed."""
        loop = _running_loop()
        with self._lock:
            self._opened = {other: each for other, each in self._opened.items() if not other.is_closed()}
        return loop

    async def _run(self, call: request_messages.PreparedCall[ResultT], *, one_of_many: bool = False) -> ResultT:
        result: ResultT | None = None
        async for event in self._run_stream(call, one_of_many=one_of_many):
            result = event
        if result is None:
            raise errors.InternalError("the response ended without a result")
        return result

    async def _run_many(self, many: batches.ConcurrentRequests[ResultT]) -> AsyncGenerator[ResultT, None]:
        running: set[asyncio.Task[ResultT]] = set()

        async def start_requests() -> None:
            # The iterator runs on a thread, because it may load images.
            while len(running) < many.in_flight and (request := await asyncio.to_thread(next, many.requests, None)):
                running.add(asyncio.create_task(self._run_with_retries(request)))

        try:
            await start_requests()
            while running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                running -= done
                await start_requests()
                for task in done:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _run_with_retries(self, request: batches.PendingRequest[ResultT]) -> ResultT:
        try:
            call = await asyncio.to_thread(request.prepare)
            explanation = await self._run(call, one_of_many=True)
            return request.to_result(explanation)
        except (errors.CamserveError, OSError) as error:
            if not (retry := request.retry(error)):
                return request.to_result(error)
        wait_s, next_request = retry
        await asyncio.sleep(wait_s)
        return await self._run_with_retries(next_request)

    async def _run_stream(
        self, call: request_messages.PreparedCall[Any], *, one_of_many: bool = False
    ) -> AsyncGenerator[Any, None]:
        """Send a request and yield its events. The event of a unary call is its result."""
        options = self._call_options(call, one_of_many=one_of_many)
        sent = self._to_send(call, options)
        delays_s = iter(RETRY_DELAYS_S)
        while True:
            channels = self._channels()
            rpc: Any = getattr(channels.stubs[one_of_many], sent.rpc)(sent.request, **options)
            try:
                with environment.calls:
                    if isinstance(rpc, grpc.aio.UnaryUnaryCall):
                        yield sent.parse_response(await rpc)
                        return
                    async for message in rpc:
                        event = sent.parse_response(message)
                        if event is not None:
                            yield event
                return
            except asyncio.CancelledError as error:
                if not self._closed or asyncio.current_task().cancelling():  # type: ignore[union-attr]  # in a task
                    raise
                raise errors.Cancelled("the client was closed while the call was in flight") from error
            except grpc.RpcError as error:
                await asyncio.to_thread(self._raise_or_wait, channels, error, call, delays_s)
            finally:
                rpc.cancel()  # This has no effect on a call that has finished.


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError as error:
        raise errors.CamserveError(
            "no event loop of asyncio is running; await the methods of camserve.aio.Client in a coroutine that asyncio "
            "runs, or use camserve.Client"
        ) from error
