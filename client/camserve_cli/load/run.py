"""Sends a load, and records what comes of each request.

A closed loop keeps so many requests on their way: who waits for a slow answer asks for nothing meanwhile, and a server
that stalls is asked less. In an open loop requests come when they come. Their times are drawn before; if the server
stalls, or the sender falls behind, they wait, and what they waited counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import grpc

from camserve import error_details, errors
from camserve.connection import SERVICE, Connection
from camserve.v1 import explain_pb2 as pb
from camserve_cli.load.mix import Ask
from camserve_cli.load.stats import UNFINISHED, Record

__all__ = ["Run", "Sender", "closed_loop", "open_loop"]

# What no server will answer, however often it is asked: the load is wrong, and is given up.
_WRONG = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
# Requests on their way take memory, each with its image. More wait their turn, and it counts.
_MOST_ON_THEIR_WAY = 4096
_TICK_S = 0.1

Cost = tuple[int, int, float, float]
Watched = Callable[["Run"], bool]


class Sender(Connection):
    """A connection that carries a share of a load. To be made where the event loop runs, and closed."""

    _grpc: ClassVar[Any] = grpc.aio
    _extra_options: ClassVar[list[tuple[str, Any]]] = [
        # Several would share one connection.
        ("grpc.use_local_subchannel_pool", 1),
        # A request that is refused and asked again is to be seen as refused.
        ("grpc.enable_retries", 0),
    ]

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(address, **options)
        # Requests are bytes already.
        self._call = self._channels[0].unary_unary(f"/{SERVICE}/Explain", None, _cost)

    async def send(self, request: bytes) -> Cost:
        """What the answer took. Raises grpc.RpcError."""
        cost: Cost = await self._call(request, timeout=self.timeout, metadata=self._headers)
        return cost

    async def close(self) -> None:
        """Calls still under way are cancelled."""
        for channel in self._channels:
            await channel.close()


def _cost(answer: bytes) -> Cost:
    """The map is read as any client would, and let go."""
    cost = pb.ExplainResponse.FromString(answer).cost
    return cost.rows, cost.batches, cost.queue_ms, cost.compute_ms


@dataclass
class Run:
    """A load on its way: what is recorded by now, and what is pending, by when it was meant to be sent.

    Measured for so many `seconds` after those of the `warmup`. Times are from the end of the warm-up on; `ended_s` is
    when the run was ended early.
    """

    senders: Sequence[Sender]
    warmup: float
    seconds: float
    records: list[Record] = field(default_factory=list)
    pending: dict[int, float] = field(default_factory=dict)
    ended_s: float | None = None
    _start: float = field(default_factory=time.perf_counter)
    _sent: int = 0
    _wrong: errors.CamserveError | None = None

    @property
    def now_s(self) -> float:
        """Negative before the end of the warm-up."""
        return time.perf_counter() - self._start - self.warmup

    @property
    def measured_s(self) -> float:
        """For how long it was measured; less than was asked for where it was ended early."""
        return self.seconds if self.ended_s is None else min(max(self.ended_s, 0.0), self.seconds)

    async def ask(self, ask: Ask, intended_s: float) -> None:
        """Send a request and record its outcome, also where it is cancelled."""
        number = self._sent
        self._sent += 1
        sender = self.senders[number % len(self.senders)]
        self.pending[number] = intended_s
        sent_s, cost, reason = self.now_s, (0, 0, 0.0, 0.0), ""
        try:
            cost = await sender.send(ask.request)
            code = "OK"
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            reason = (error_details.read(error.trailing_metadata()) or {}).get("reason", "")
            if error.code() in _WRONG:
                self._wrong = errors.from_rpc(error, address=sender.address, timeout_s=sender.timeout)
        except asyncio.CancelledError:
            code = UNFINISHED
        del self.pending[number]
        self.records.append(Record(ask.method, ask.image, intended_s, sent_s, self.now_s, code, reason, *cost))

    async def watched(self, sending: Coroutine[Any, Any, None], goes_on: Watched) -> Run:
        """Until all is sent and done, or `goes_on`, which is asked often, says no.

        Raises what the server says of a load that is wrong.
        """
        task = asyncio.create_task(sending)
        while not task.done() and not self._wrong and goes_on(self):
            await asyncio.wait({task}, timeout=_TICK_S)
        if not task.done():
            self.ended_s = self.now_s
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.result()
        if self._wrong:
            raise self._wrong
        return self


async def open_loop(run: Run, asks: Iterator[Ask], times: Iterable[float], goes_on: Watched) -> Run:
    """Send each request at its time, in seconds from the start of the warm-up, whatever became of those before."""
    room = asyncio.Semaphore(_MOST_ON_THEIR_WAY)

    async def one(ask: Ask, intended_s: float) -> None:
        await run.ask(ask, intended_s)
        room.release()

    async def send() -> None:
        async with asyncio.TaskGroup() as tasks:
            for at in times:
                intended_s = at - run.warmup
                # Also where it is late already, so that answers are read.
                await asyncio.sleep(max(0.0, intended_s - run.now_s))
                await room.acquire()
                tasks.create_task(one(next(asks), intended_s))

    return await run.watched(send(), goes_on)


async def closed_loop(run: Run, asks: Iterator[Ask], in_flight: int, goes_on: Watched) -> Run:
    """Keep so many requests on their way until the time is over."""

    async def caller() -> None:
        while run.now_s < run.seconds and run.ended_s is None:
            await run.ask(next(asks), run.now_s)

    async def send() -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(in_flight):
                tasks.create_task(caller())

    return await run.watched(send(), goes_on)
