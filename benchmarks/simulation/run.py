"""One simulation: arrivals, clients and replicas, and the requests that ended."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulation.balancing import POLICIES, RoundRobin
from benchmarks.simulation.clients import OK, Clients, Request
from benchmarks.simulation.events import Timeline
from benchmarks.simulation.profile import Profile
from benchmarks.simulation.replica import MAX_ROWS_OWED, Replica

TIMEOUT_S = 30.0  # default of the Python client
TICK = 1000  # requests per call of `tick`


@dataclass(frozen=True)
class ZoneLoss:
    """Loss of a third of the replicas.

    Attributes:
        start_s: Time of the loss.
        seconds: Duration of the loss.
        noticed_s: Seconds until clients notice that their connections are dead.
    """

    start_s: float
    seconds: float
    noticed_s: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """Settings of a simulation.

    Attributes:
        profile: Times of each replica.
        mix: Share of the requests by name of the method.
        capacity: Requests per second that one replica completes (`capacity`).
        load: Requests per second of all clients at the peak, as a share of the capacity of all replicas.
        seconds: Time until which requests arrive. The simulation continues until the last one has ended.
        curve: Function from the time in seconds to the requests per second as a share of the peak, 0 to 1.
        replicas: Number of replicas.
        policy: Name of the load balancing policy.
        clients: Number of clients, which send equally many requests.
        loss: Loss of a zone; None for none.
        timeout_s: Timeout of the clients.
        max_rows_owed: Limit of the rows that may wait in a replica.
        seed: Seed of all random numbers.
    """

    profile: Profile
    mix: Mapping[str, float]
    capacity: float
    load: float
    seconds: float
    curve: Callable[[float], float] = lambda time: 1.0
    replicas: int = 1
    policy: str = "load reports"
    clients: int = 100
    loss: ZoneLoss | None = None
    timeout_s: float = TIMEOUT_S
    max_rows_owed: int = MAX_ROWS_OWED
    seed: int = 0

    @property
    def peak(self) -> float:
        """Requests per second of all clients at the peak."""
        return self.load * self.capacity * self.replicas

    @property
    def requests(self) -> int:
        """Approximate number of requests."""
        steps = 100
        mean = sum(self.curve((i + 0.5) / steps * self.seconds) for i in range(steps)) / steps
        return round(self.peak * mean * self.seconds)


@dataclass(frozen=True)
class Ended:
    """Requests in the order of their ends.

    Attributes:
        sent: Times at which the clients sent them, in seconds.
        seconds: Times until their ends, retries included.
        methods: Names of the methods.
        statuses: gRPC statuses.
        attempts: Numbers of calls.
        early: True for results that a deadline made smaller.
    """

    sent: NDArray[np.float64]
    seconds: NDArray[np.float64]
    methods: NDArray[np.str_]
    statuses: NDArray[np.str_]
    attempts: NDArray[np.int64]
    early: NDArray[np.bool_]

    def since(self, start_s: float, stop_s: float = math.inf) -> Ended:
        """Return the requests that were sent in an interval."""
        return self._where((self.sent >= start_s) & (self.sent < stop_s))

    def of(self, method: str) -> Ended:
        """Return the requests of a method."""
        return self._where(self.methods == method)

    def within(self, seconds: float) -> float:
        """Return the share of the requests that had a result within some seconds. NaN without requests."""
        return float(np.mean((self.statuses == OK) & (self.seconds <= seconds))) if len(self.sent) else math.nan

    def status(self, status: str) -> float:
        """Return the share of the requests with a status. NaN without requests."""
        return float(np.mean(self.statuses == status)) if len(self.sent) else math.nan

    def percentile(self, share: float) -> float:
        """Return a percentile of the seconds until a result; a failed request counts as infinitely long."""
        seconds = np.where(self.statuses == OK, self.seconds, math.inf)
        return float(np.quantile(seconds, share, method="inverted_cdf")) if len(seconds) else math.nan

    def _where(self, mask: NDArray[np.bool_]) -> Ended:
        return Ended(
            self.sent[mask],
            self.seconds[mask],
            self.methods[mask],
            self.statuses[mask],
            self.attempts[mask],
            self.early[mask],
        )


def simulate(scenario: Scenario, tick: Callable[[int], None] = lambda requests: None) -> Ended:
    """Run a scenario.

    Args:
        scenario: The settings. The same settings give the same result.
        tick: Called with a number of requests that have arrived since the last call.

    Returns:
        All requests, each once.
    """
    timeline = Timeline()
    replicas = [Replica(timeline, scenario.profile, scenario.max_rows_owed) for _ in range(scenario.replicas)]
    arrivals, policy, delays = (random.Random(f"{scenario.seed} {name}") for name in ("arrivals", "policy", "delays"))
    ended: list[Request] = []
    costs = dict(scenario.profile.methods)
    clients = Clients(
        timeline, replicas, costs, POLICIES[scenario.policy](policy, timeline.clock), delays, ended.append
    )
    methods, bounds = [*scenario.mix], [*itertools.accumulate(scenario.mix.values())]
    arrived, peak = 0, scenario.peak

    def arrive() -> None:
        """Send a request, and plan the next arrival: a Poisson process whose rate changes, by thinning."""
        nonlocal arrived
        now = timeline.now
        if arrivals.random() < scenario.curve(now):
            [method] = arrivals.choices(methods, cum_weights=bounds)
            clients.send(Request(arrivals.randrange(scenario.clients), method, now, now + scenario.timeout_s))
            arrived += 1
            if arrived % TICK == 0:
                tick(TICK)
        plan_arrival()

    def plan_arrival() -> None:
        at = timeline.now + arrivals.expovariate(peak)
        if at < scenario.seconds:
            timeline.at(at, arrive)

    plan_arrival()
    if scenario.loss is not None:
        zone = replicas[::3]
        timeline.at(scenario.loss.start_s, clients.lose, zone, scenario.loss.noticed_s)
        timeline.at(scenario.loss.start_s + scenario.loss.seconds, clients.restore, zone)
    timeline.run()
    return _columns(ended)


def _columns(ended: list[Request]) -> Ended:
    return Ended(
        np.array([each.sent for each in ended]),
        np.array([each.ended - each.sent for each in ended]),
        np.array([each.method for each in ended], dtype=np.str_),
        np.array([each.status for each in ended], dtype=np.str_),
        np.array([each.attempts for each in ended], dtype=np.int64),
        np.array([each.early for each in ended], dtype=np.bool_),
    )


def capacity(
    profile: Profile, mix: Mapping[str, float], callers: int = 32, requests: int = 4000, seed: int = 0
) -> float:
    """Return the requests per second that one replica completes for callers that always wait for one request each.

    Args:
        profile: Times of the replica.
        mix: Share of the requests by name of the method.
        callers: Number of callers.
        requests: Number of requests, of which the first fifth is not counted.
        seed: Seed of the random numbers.
    """
    timeline, choices = Timeline(), random.Random(seed)
    ended: list[float] = []
    methods, bounds = [*mix], [*itertools.accumulate(mix.values())]

    def send() -> None:
        [method] = choices.choices(methods, cum_weights=bounds)
        request = Request(0, method, timeline.now, math.inf)
        clients.send(request)

    def again(request: Request) -> None:
        ended.append(timeline.now)
        if len(ended) < requests:
            timeline.at(timeline.now, send)

    replica = Replica(timeline, profile, max_rows_owed=1_000_000_000)
    clients = Clients(timeline, [replica], dict(profile.methods), RoundRobin(choices, timeline.clock), choices, again)
    for _ in range(callers):
        timeline.at(0.0, send)
    timeline.run()
    first = requests // 5
    return (requests - 1 - first) / (ended[requests - 1] - ended[first])
