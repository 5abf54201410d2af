"""The client, blocking."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc

from camserve import batches, errors, request_messages
from camserve.connection import Connection

__all__ = ["Client"]

P = ParamSpec("P")
Answer = TypeVar("Answer")
Event = TypeVar("Event")


def _unary(call: Callable[P, request_messages.Call[Answer]]) -> Callable[Concatenate[Client, P], Answer]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        return self._answer(call(*args, **kwargs))

    request_messages.described(method, call)
    return method


def _stream(
    call: Callable[P, request_messages.Streamable[Answer, Event]],
) -> Callable[Concatenate[Client, P], Generator[Event, None, None]]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[Event, None, None]:
        return self._events(call(*args, **kwargs).streamed())

    request_messages.described(method, call, Iterator, streams=True)
    return method


def _many(
    call: Callable[P, batches.Many[Answer]],
) -> Callable[Concatenate[Client, P], Generator[Answer, None, None]]:
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[Answer, None, None]:
        return self._answers(call(*args, **kwargs))

    request_messages.described(method, call, Iterator)
    return method


class Client(Connection):
    """A connection to a camserve server at `address`, "host:port".

    Connects when first used; may be shared between threads; to be closed, best by `with`. A call that is interrupted,
    by Ctrl-C for instance, is cancelled at the server, too.

    `address` may also be any other name that gRPC knows, such as dns:///host:port; where it stands for several servers,
    calls take turns among those that are ready. `timeout` is how many seconds a call may take, tries again included,
    unless it says otherwise; None waits as long as it takes.

    `tls` asks for TLS; `ca`, `certificate` and `key`, PEM files or what is in them, do, too: whom to trust instead of
    the authorities that gRPC knows, and who this is. `token` is sent with each call; without TLS, only to this machine.
    """

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

    def close(self) -> None:
        """Close the connection. Calls still under way are cancelled; the client is of no further use."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.address!r})"

    def _sent(self, stub: Any, call: request_messages.Call[Any]) -> Any:
        # As a future, because the blocking form would leave the call running at the server when interrupted.
        return getattr(stub, call.rpc).future(call.request, **self._given(call))

    def _read(self, call: request_messages.Call[Answer], rpc: Any) -> Answer:
        try:
            return call.read(rpc.result())
        except grpc.RpcError as error:
            raise self._error(error, call) from error
        except grpc.FutureCancelledError as error:
            raise errors.Cancelled("the client was closed while the call was under way") from error

    def _answer(self, call: request_messages.Call[Answer]) -> Answer:
        rpc = self._sent(self._stub, call)
        try:
            return self._read(call, rpc)
        finally:
            rpc.cancel()  # does nothing to a call that has ended

    def _answers(self, asked: batches.Many[Answer]) -> Generator[Answer, None, None]:
        flying: set[Any] = set()
        # How to get at the answer of each ask that has ended: in a list, which is empty where it is asked for again.
        ended: SimpleQueue[Callable[[], list[Answer]]] = SimpleQueue()

        def start(ask: batches.Ask[Answer]) -> None:
            try:
                call = ask.call()
            except (errors.CamserveError, OSError) as error:
                failure = error  # the name of an except clause is gone after it
                ended.put(lambda: [ask.answer(failure)])
                return
            rpc = self._sent(self._stub_of_many, call)
            flying.add(rpc)
            rpc.add_done_callback(lambda rpc: ended.put(lambda: finish(ask, call, rpc)))

        def finish(ask: batches.Ask[Answer], call: request_messages.Call[Any], rpc: Any) -> list[Answer]:
            flying.discard(rpc)
            try:
                return [ask.answer(self._read(call, rpc))]
            except errors.CamserveError as error:
                if not (later := ask.again(error)):
                    return [ask.answer(error)]
            wait_s, again = later
            time.sleep(wait_s)  # nothing new is asked for meanwhile: the server is busy
            start(again)
            return []

        try:
            owed = 0
            for ask in itertools.islice(asked.asks, asked.in_flight):
                start(ask)
                owed += 1
            while owed:
                for answer in ended.get()():
                    owed -= 1
                    # Before the caller looks at the answer, and takes its time.
                    for ask in itertools.islice(asked.asks, 1):
                        start(ask)
                        owed += 1
                    yield answer
        finally:
            for rpc in flying:
                rpc.cancel()

    def _events(self, call: request_messages.Call[Event | None]) -> Generator[Event, None, None]:
        rpc: Any = getattr(self._stub, call.rpc)(call.request, **self._given(call))
        try:
            for message in rpc:
                event = call.read(message)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise self._error(error, call) from error
        finally:
            rpc.cancel()  # does nothing to a call that has ended
