"""Sender of a load, which records the outcome of each request.

A closed loop keeps a fixed number of requests pending. A caller sends its next request only after the previous answer,
so a server that stalls receives fewer requests. In an open loop, the send times are drawn beforehand. If the server
stalls or the sender falls behind, later requests wait, and their latencies include the wait.
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
from camserve_cli.load.mix import PreparedRequest
from camserve_cli.load.stats import UNFINISHED, Record

__all__ = ["LoadRun", "Sender", "ShouldContinue", "closed_loop", "open_loop"]

# The server will refuse such a request every time, so the load stops at the first of these errors.
_PERMANENT_ERRORS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
# Each pending request holds its image in memory. Further requests wait to be sent, and their latencies include the
# wait.
_MAX_PENDING = 4096
_TICK_S = 0.1

# Rows, batches, and milliseconds in the queue and in computation.
Cost = tuple[int, int, float, float]
ShouldContinue = Callable[["LoadRun"], bool]


class Sender(Connection):
    """Connection that carries a share of a load. Create it inside the running event loop, and close it."""

    _grpc: ClassVar[Any] = grpc.aio
    _extra_options: ClassVar[list[tuple[str, Any]]] = [
        # Without this option, several senders would share one connection.
        ("grpc.use_local_subchannel_pool", 1),
        # A refused request must be recorded as refused, not retried.
        ("grpc.enable_retries", 0),
    ]

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(address, **options)
        # Requests are serialised beforehand.
        self._call = self._channels().default.unary_unary(f"/{SERVICE}/Explain", None, _read_cost)

    async def send(self, message: bytes) -> Cost:
        """Send a serialised request and return the cost that the server reports.

        Raises:
            grpc.RpcError: The call failed.
        """
        cost: Cost = await self._call(message, timeout=self.timeout, metadata=self._headers)
        return cost

    async def close(self) -> None:
        """Close the connection, which cancels pending calls."""
        for _, channel in self._take_channels():
            await channel.close()


def _read_cost(answer: bytes) -> Cost:
    """Parse the whole answer, as any client would, and keep its cost."""
    cost = pb.ExplainResponse.FromString(answer).cost
    return cost.rows, cost.batches, cost.queue_ms, cost.compute_ms


@dataclass
class LoadRun:
    """Progress of a load. Times are in seconds from the end of the warm-up.

    Attributes:
        senders: Connections to the server. Requests use them in turn.
        warmup: Seconds before the measurement.
        seconds: Duration of the measurement.
        records: The finished requests.
        pending: Intended send times of the pending requests, by number.
        ended_s: Time at which the load was ended early, or None.
    """

    senders: Sequence[Sender]
    warmup: float
    seconds: float
    records: list[Record] = field(default_factory=list)
    pending: dict[int, float] = field(default_factory=dict)
    ended_s: float | None = None
    _start: float = field(default_factory=time.perf_counter)
    _sent: int = 0
    _permanent_error: errors.CamserveError | None = None

    @property
    def now_s(self) -> float:
        """Seconds since the end of the warm-up, negative before it."""
        return time.perf_counter() - self._start - self.warmup

    @property
    def measured_s(self) -> float:
        """Duration of the measurement, shorter than `seconds` if the load was ended early."""
        return self.seconds if self.ended_s is None else min(max(self.ended_s, 0.0), self.seconds)

    async def send(self, request: PreparedRequest, intended_s: float) -> None:
        """Send a request and record its outcome, also if the task is cancelled."""
        number = self._sent
        self._sent += 1
        sender = self.senders[number % len(self.senders)]
        self.pending[number] = intended_s
        sent_s, cost, code, reason = self.now_s, (0, 0, 0.0, 0.0), UNFINISHED, ""
        try:
            cost = await sender.send(request.message)
            code = "OK"
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            reason = (error_details.read(error.trailing_metadata()) or {}).get("reason", "")
            if error.code() in _PERMANENT_ERRORS:
                self._permanent_error = errors.from_rpc(error, address=sender.address, timeout_s=sender.timeout)
        finally:
            del self.pending[number]
            record = Record(request.method, request.image, intended_s, sent_s, self.now_s, code, reason, *cost)
            self.records.append(record)

    async def run_until(self, sending: Coroutine[Any, Any, None], should_continue: ShouldContinue) -> LoadRun:
        """Run `sending` until it is complete or `should_continue` returns False.

        Returns:
            This object.

        Raises:
            CamserveError: The server refused a request in a way that no retry can change.
        """
        task = asyncio.create_task(sending)
        while not task.done() and not self._permanent_error and should_continue(self):
            await asyncio.wait({task}, timeout=_TICK_S)
        if not task.done():
            self.ended_s = self.now_s
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.result()
        if self._permanent_error:
            raise self._permanent_error
        return self


async def open_loop(
    run: LoadRun, requests: Iterator[PreparedRequest], times: Iterable[float], should_continue: ShouldContinue
) -> LoadRun:
    """Send each request at its time, independently of the answers.

    Args:
        run: The run that records the requests.
        requests: Iterator without end.
        times: Send times, in seconds from the start of the warm-up.
        should_continue: The load ends when this function returns False.
    """
    pending_slots = asyncio.Semaphore(_MAX_PENDING)

    async def send_one(request: PreparedRequest, intended_s: float) -> None:
        await run.send(request, intended_s)
        pending_slots.release()

    async def send_all() -> None:
        async with asyncio.TaskGroup() as tasks:
            for at in times:
                intended_s = at - run.warmup
                # A sender that is late must still sleep for 0 s, so that the event loop reads answers.
                await asyncio.sleep(max(0.0, intended_s - run.now_s))
                await pending_slots.acquire()
                tasks.create_task(send_one(next(requests), intended_s))

    return await run.run_until(send_all(), should_continue)


async def closed_loop(
    run: LoadRun, requests: Iterator[PreparedRequest], in_flight: int, should_continue: ShouldContinue
) -> LoadRun:
    """Keep `in_flight` requests pending until the measurement is over or `should_continue` returns False."""

    async def caller() -> None:
        while run.now_s < run.seconds and run.ended_s is None:
            await run.send(next(requests), run.now_s)

    async def send_all() -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(in_flight):
                tasks.create_task(caller())

    return await run.run_until(send_all(), should_continue)
