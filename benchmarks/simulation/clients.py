"""Clients that send requests to replicas and retry as the Python client does."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.simulation.balancing import Policy
from benchmarks.simulation.events import Timeline
from benchmarks.simulation.profile import MethodCost
from benchmarks.simulation.replica import Replica, Reply
from camserve_server.errors import CamserveError, Unavailable

# The retry policy in `camserve.connection`. gRPC varies each of its delays by a fifth.
MAX_ATTEMPTS = 4
FIRST_BACKOFF_S, MAX_BACKOFF_S, BACKOFF_FACTOR, JITTER = 0.1, 2.0, 4.0, 0.2
RETRYABLE = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
MAX_RECONNECT_S = 5.0  # longest time until a client connects to a replica that has returned
OK, EXPIRED = "OK", "DEADLINE_EXCEEDED"


@dataclass(eq=False, slots=True)
class Request:
    """A request and its end.

    Attributes:
        client: Number of the client.
        method: Name of the method.
        sent: Time at which the client sends it.
        deadline: Time at which the client gives up.
        attempts: Number of calls.
        status: gRPC status; empty until the request has ended.
        ended: Time of the end.
        early: True if the deadline made the result smaller.
    """

    client: int
    method: str
    sent: float
    deadline: float
    attempts: int = 0
    status: str = ""
    ended: float = 0.0
    early: bool = False


@dataclass(eq=False, slots=True)
class _Call:
    request: Request
    replica: Replica
    admitted: bool = False
    over: bool = False


class Clients:
    """All clients and their connections to the replicas.

    Args:
        timeline: Clock and events.
        replicas: All replicas, which are ready.
        costs: Rows of each method.
        balancer: Policy of the clients.
        choices: Random numbers of the retry delays.
        ended: Receives each request at its end.
    """

    def __init__(
        self,
        timeline: Timeline,
        replicas: Sequence[Replica],
        costs: dict[str, MethodCost],
        balancer: Policy,
        choices: random.Random,
        ended: Callable[[Request], None],
    ) -> None:
        self._timeline = timeline
        self._ready = [*replicas]
        self._all = [*replicas]
        self._costs = costs
        self._balancer = balancer
        self._choices = choices
        self._ended = ended
        self._running: dict[int, _Call] = {}

    def send(self, request: Request) -> None:
        """Send a request. A refused one is sent again."""
        request.attempts += 1
        if not self._ready:
            self._failed(request, Unavailable("no replica is ready"))
            return
        replica = self._balancer.pick(request.client, self._ready)
        call = _Call(request, replica)
        self._running[id(call)] = call
        self._balancer.started(request.client, replica)
        if replica.reachable:
            call.admitted = replica.call(
                self._costs[request.method], request.deadline, lambda reply: self._reply(call, reply)
            )

    def lose(self, replicas: Sequence[Replica], noticed_s: float) -> None:
        """Lose replicas at once with their requests.

        Args:
            replicas: The lost replicas.
            noticed_s: Seconds until the clients notice that their connections are dead. They send requests meanwhile.
        """
        for replica in replicas:
            replica.lose()
        self._timeline.at(self._timeline.now + noticed_s, self._disconnect, replicas)

    def restore(self, replicas: Sequence[Replica]) -> None:
        """Let replicas return. Clients connect to them after a random time."""
        for replica in replicas:
            replica.restart()
            self._timeline.at(self._timeline.now + self._choices.uniform(0, MAX_RECONNECT_S), self._connect, replica)

    def _connect(self, replica: Replica) -> None:
        ready = {*self._ready, replica}
        self._ready = [each for each in self._all if each in ready]

    def _disconnect(self, replicas: Sequence[Replica]) -> None:
        lost = {*replicas}
        self._ready = [each for each in self._ready if each not in lost]
        for call in [call for call in self._running.values() if call.replica in lost]:
            self._reply(call, Reply(Unavailable("the connection was lost")))

    def _reply(self, call: _Call, reply: Reply) -> None:
        del self._running[id(call)]
        request = call.request
        self._balancer.ended(request.client, call.replica)
        if reply.error is None:
            request.early = reply.early
            self._end(request, OK)
        elif call.admitted and reply.error.code in RETRYABLE:  # the request may have run, so it is not repeated
            self._end(request, reply.error.code)
        else:
            self._failed(request, reply.error)

    def _failed(self, request: Request, error: CamserveError) -> None:
        """Send the request again if gRPC does; otherwise end it."""
        now = self._timeline.now
        wait_s = error.retry_after_s
        if (
            error.code not in RETRYABLE
            or request.attempts == MAX_ATTEMPTS
            or (wait_s is not None and wait_s >= request.deadline - now)  # the server then tells gRPC not to retry
        ):
            self._end(request, error.code)
            return
        if wait_s is None:
            backoff_s = min(FIRST_BACKOFF_S * BACKOFF_FACTOR ** (request.attempts - 1), MAX_BACKOFF_S)
            wait_s = backoff_s * self._choices.uniform(1 - JITTER, 1 + JITTER)
        if now + wait_s >= request.deadline:
            self._timeline.at(request.deadline, self._end, request, EXPIRED)  # gRPC waits until the deadline
        else:
            self._timeline.at(now + wait_s, self.send, request)

    def _end(self, request: Request, status: str) -> None:
        if request.status:
            raise RuntimeError(f"a request ended with {request.status} and again with {status}; this is a bug")
        late = self._timeline.now > request.deadline  # the client has given up at the deadline
        request.status = EXPIRED if late else status
        request.ended = min(self._timeline.now, request.deadline)
        self._ended(request)
