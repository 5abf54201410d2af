"""The client, awaited: `camserve.aio.Client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import grpc

from camserve import batches, errors, request_messages
from camserve.connection import Connection

__all__ = ["Client"]

P = ParamSpec("P")
Answer = TypeVar("Answer")
Event = TypeVar("Event")

# Making a call reads files and copies pixels, so it happens on a thread beside the event loop.


def _unary(
    call: Callable[P, request_messages.Call[Answer]],
) -> Callable[Concatenate[Client, P], Coroutine[Any, Any, Answer]]:
    async def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        return await self._answer(await asyncio.to_thread(call, *args, **kwargs))

    request_messages.described(method, call, Awaitable)
    return method


def _stream(
    call: Callable[P, request_messages.Streamable[Answer, Event]],
) -> Callable[Concatenate[Client, P], AsyncGenerator[Event, None]]:
    async def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Event, None]:
        made = await asyncio.to_thread(call, *args, **kwargs)
        async for event in self._events(made.streamed()):
            yield event

    request_messages.described(method, call, AsyncIterator, streams=True)
    return method


def _many(
    call: Callable[P, batches.Many[Answer]],
) -> Callable[Concatenate[Client, P], AsyncGenerator[Answer, None]]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Answer, None]:
        return self._answers(call(*args, **kwargs))

    request_messages.described(method, call, AsyncIterator)
    return method


class Client(Connection):
    """A connection to a camserve server at `address`, "host:port". To be made where the event loop runs.

    Connects when first used; to be closed, best by `async with`. Cancelling the task that awaits a call cancels it at
    the server, too. Wrap a stream that may be left early in `contextlib.aclosing`, or else it ends only when it is
    collected. What it takes is what `camserve.Client` takes.
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
        """Close the connection. Calls still under way are cancelled; the client is of no further use."""
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"aio.Client({self.address!r})"

    async def _answer(self, call: request_messages.Call[Answer], stub: Any = None) -> Answer:
        try:
            return call.read(await getattr(stub or self._stub, call.rpc)(call.request, **self._given(call)))
        except grpc.RpcError as error:
            raise self._error(error, call) from error

    async def _answers(self, asked: batches.Many[Answer]) -> AsyncGenerator[Answer, None]:
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

    async def _outcome(self, ask: batches.Ask[Answer]) -> Answer:
        try:
            call = await asyncio.to_thread(ask.call)
            explanation = await self._answer(call, self._stub_of_many)
            return ask.answer(explanation)
        except (errors.CamserveError, OSError) as error:
            if not (later := ask.again(error)):
                return ask.answer(error)
        wait_s, again = later
        await asyncio.sleep(wait_s)
        return await self._outcome(again)

    async def _events(self, call: request_messages.Call[Event | None]) -> AsyncGenerator[Event, None]:
        rpc: Any = getattr(self._stub, call.rpc)(call.request, **self._given(call))
        try:
            async for message in rpc:
                event = call.read(message)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise self._error(error, call) from error
        finally:
            rpc.cancel()  # does nothing to a call that has ended
