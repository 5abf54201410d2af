"""The client, awaited: `camserve.aio.Client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc

from camserve import calls, errors, many
from camserve.v1.explain_pb2_grpc import ExplainServiceStub

__all__ = ["Client"]

P = ParamSpec("P")
Answer = TypeVar("Answer")
Event = TypeVar("Event")

# Making a call reads files and copies pixels, so it happens on a thread beside the event loop.


def _unary(
    call: Callable[P, calls.Call[Answer]],
) -> Callable[Concatenate[Client, P], Coroutine[Any, Any, Answer]]:
    async def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        return await self._answer(await asyncio.to_thread(call, *args, **kwargs))

    calls.described(method, call, Awaitable)
    return method


def _stream(
    call: Callable[P, calls.Streamable[Answer, Event]],
) -> Callable[Concatenate[Client, P], AsyncGenerator[Event, None]]:
    async def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Event, None]:
        made = await asyncio.to_thread(call, *args, **kwargs)
        async for event in self._events(made.streamed()):
            yield event

    calls.described(method, call, AsyncIterator, streams=True)
    return method


def _many(
    call: Callable[P, many.Many[Answer]],
) -> Callable[Concatenate[Client, P], AsyncGenerator[Answer, None]]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Answer, None]:
        return self._answers(call(*args, **kwargs))

    calls.described(method, call, AsyncIterator)
    return method


class Client:
    """A connection to a camserve server at `address`, "host:port". To be made where the event loop runs.

    Connects when first used; to be closed, best by `async with`. `timeout` is how many seconds a call may take unless
    it says otherwise; None waits as long as it takes. Cancelling the task that awaits a call cancels it at the server,
    too. Wrap a stream that may be left early in `contextlib.aclosing`, or else it ends only when it is collected.
    """

    def __init__(
        self, address: str = calls.DEFAULT_ADDRESS, *, timeout: float | None = calls.DEFAULT_TIMEOUT_S
    ) -> None:
        self.address = address
        self.timeout = timeout
        self._channel = grpc.aio.insecure_channel(address, options=calls.CHANNEL_OPTIONS)
        self._stub = ExplainServiceStub(self._channel)

    explain = _unary(calls.explain)
    explain_stream = _stream(calls.explain)
    evaluate = _unary(calls.evaluate)
    evaluate_stream = _stream(calls.evaluate)
    evaluate_many = _many(many.evaluate_many)
    replay = _unary(calls.replay)
    replay_stream = _stream(calls.replay)
    models = _unary(calls.list_models)
    methods = _unary(calls.list_methods)
    metrics = _unary(calls.list_metrics)

    async def close(self) -> None:
        """Close the connection. Calls still under way are cancelled; the client is of no further use."""
        await self._channel.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"aio.Client({self.address!r})"

    async def _answer(self, call: calls.Call[Answer]) -> Answer:
        timeout = self.timeout if call.timeout is None else call.timeout
        try:
            return call.read(await getattr(self._stub, call.rpc)(call.request, timeout=timeout))
        except grpc.RpcError as error:
            raise errors.from_rpc(error, address=self.address, timeout_s=timeout) from error

    async def _answers(self, asked: many.Many[Answer]) -> AsyncGenerator[Answer, None]:
        running: set[asyncio.Task[Answer]] = set()

        async def top_up() -> None:
            # Images that are made as they are asked for may take their time, too.
            while len(running) < asked.in_flight and (ask := await asyncio.to_thread(next, asked.asks, None)):
                running.add(asyncio.create_task(self._outcome(ask)))

        try:
            await top_up()
            while running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                running -= done
                await top_up()
                for task in done:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _outcome(self, ask: many.Ask[Answer]) -> Answer:
        try:
            call = await asyncio.to_thread(ask.call)
            explanation = await self._answer(call)
            return ask.answer(explanation)
        except (errors.CamserveError, OSError) as error:
            if not (later := ask.again(error)):
                return ask.answer(error)
        wait_s, again = later
        await asyncio.sleep(wait_s)
        return await self._outcome(again)

    async def _events(self, call: calls.Call[Event | None]) -> AsyncGenerator[Event, None]:
        timeout = self.timeout if call.timeout is None else call.timeout
        rpc: Any = getattr(self._stub, call.rpc)(call.request, timeout=timeout)
        try:
            async for message in rpc:
                event = call.read(message)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise errors.from_rpc(error, address=self.address, timeout_s=timeout) from error
        finally:
            rpc.cancel()  # does nothing to a call that has ended
