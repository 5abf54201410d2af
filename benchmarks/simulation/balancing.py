"""Load balancing: how a client chooses the replica of a call."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence

from benchmarks.simulation.replica import Replica
from camserve_server.service.load_reports.reports import SHORTEST_INTERVAL_S, utilization


class Policy(ABC):
    """Base class of the policies.

    Args:
        choices: Random numbers.
        clock: Returns the simulated time in seconds.
    """

    def __init__(self, choices: random.Random, clock: Callable[[], float]) -> None:
        self._choices = choices
        self._clock = clock

    @abstractmethod
    def pick(self, client: int, replicas: Sequence[Replica]) -> Replica:
        """Return one of the replicas that are ready, of which there is at least one."""

    def started(self, client: int, replica: Replica) -> None:  # noqa: B027 - most policies ignore it
        """Note that a call has started."""

    def ended(self, client: int, replica: Replica) -> None:  # noqa: B027 - most policies ignore it
        """Note that a call has ended."""


class RoundRobin(Policy):
    """Each client calls all replicas in turn, from a random one on."""

    def __init__(self, choices: random.Random, clock: Callable[[], float]) -> None:
        super().__init__(choices, clock)
        self._next: dict[int, int] = {}

    def pick(self, client: int, replicas: Sequence[Replica]) -> Replica:
        """Return the next replica of this client."""
        at = self._next.get(client)
        if at is None:
            at = self._choices.randrange(len(replicas))
        self._next[client] = at + 1
        return replicas[at % len(replicas)]


class WeightedRoundRobin(Policy):
    """gRPC's policy `weighted_round_robin` with the load reports of the replicas, as the Python client uses it.

    A client visits the replicas in turn and skips each of them so often that its share of the calls is proportional to
    its weight, as gRPC's static stride scheduler does it. All replicas report at the same times.
    """

    def __init__(self, choices: random.Random, clock: Callable[[], float]) -> None:
        super().__init__(choices, clock)
        self._visits: dict[int, int] = {}
        self._weights: dict[int, float] = {}
        self._reported = -1  # number of the last reports
        # The weights of the replicas that are ready, for all calls until the next reports.
        self._ready: Sequence[Replica] = ()
        self._scaled: list[int] = []

    def pick(self, client: int, replicas: Sequence[Replica]) -> Replica:
        """Return the next replica that the client does not skip."""
        if (number := int(self._clock() / SHORTEST_INTERVAL_S)) > self._reported:
            self._reported = number
            self._weights = {id(each): 1 / utilization(each.seconds_owed()) for each in replicas}
            self._ready = ()
        if replicas is not self._ready:
            self._ready, self._scaled = replicas, _scaled([self._weights.get(id(each), 0.0) for each in replicas])
        weights = self._scaled
        visit = self._visits.get(client)
        if visit is None:
            visit = self._choices.randrange(_MOST)
        while True:
            generation, at = divmod(visit, len(replicas))
            visit += 1
            if (generation * weights[at] + at * (_MOST // 2)) % _MOST >= _MOST - weights[at]:
                self._visits[client] = visit
                return replicas[at]


_MOST = 65_535  # the largest weight of gRPC's scheduler


def _scaled(weights: Sequence[float]) -> list[int]:
    """Return weights from 1 to `_MOST`. No weight differs from the mean by more than a factor of ten.

    A replica without a weight has the mean.
    """
    known = [weight for weight in weights if weight]
    mean = sum(known) / len(known) if known else 1.0
    limited = [min(max(weight or mean, mean / 10), mean * 10) for weight in weights]
    return [max(1, round(_MOST * weight / max(limited))) for weight in limited]


class LeastLoaded(Policy):
    """The replica that owes the fewest rows, as a balancer knows it that sees all replicas without any delay."""

    def pick(self, client: int, replicas: Sequence[Replica]) -> Replica:
        """Return the replica with the fewest rows."""
        return min(replicas, key=Replica.rows_owed)


class TwoChoices(Policy):
    """Two random replicas; the one of them that owes fewer rows at this moment."""

    def pick(self, client: int, replicas: Sequence[Replica]) -> Replica:
        """Return the better one of two replicas."""
        return min(_two(self._choices, replicas), key=Replica.rows_owed)


class TwoChoicesByOwnCalls(Policy):
    """Two random replicas; the one of them with fewer calls of this client. It needs no information of the server."""

    def __init__(self, choices: random.Random, clock: Callable[[], float]) -> None:
        super().__init__(choices, clock)
        self._calls: defaultdict[tuple[int, int], int] = defaultdict(int)

    def pick(self, client: int, replicas: Sequence[Replica]) -> Replica:
        """Return the better one of two replicas."""
        return min(_two(self._choices, replicas), key=lambda replica: self._calls[client, id(replica)])

    def started(self, client: int, replica: Replica) -> None:
        """Count the call."""
        self._calls[client, id(replica)] += 1

    def ended(self, client: int, replica: Replica) -> None:
        """No longer count the call."""
        self._calls[client, id(replica)] -= 1


class TwoChoicesByResponses(Policy):
    """Two random replicas; the one of them whose last response to this client reported fewer rows."""

    def __init__(self, choices: random.Random, clock: Callable[[], float]) -> None:
        super().__init__(choices, clock)
        self._reports: dict[tuple[int, int], int] = {}

    def pick(self, client: int, replicas: Sequence[Replica]) -> Replica:
        """Return the better one of two replicas."""
        return min(_two(self._choices, replicas), key=lambda replica: self._reports.get((client, id(replica)), 0))

    def ended(self, client: int, replica: Replica) -> None:
        """Remember the load that the response contains."""
        self._reports[client, id(replica)] = replica.rows_owed()


class TwoChoicesByPeriodicReports(Policy):
    """Two random replicas; the one of them that owed fewer rows when all replicas last reported, once per second."""

    def __init__(self, choices: random.Random, clock: Callable[[], float]) -> None:
        super().__init__(choices, clock)
        self._reports: dict[int, int] = {}
        self._reported = -1  # second of the last reports

    def pick(self, client: int, replicas: Sequence[Replica]) -> Replica:
        """Return the better one of two replicas."""
        if int(self._clock()) > self._reported:
            self._reported = int(self._clock())
            self._reports = {id(replica): replica.rows_owed() for replica in replicas}
        return min(_two(self._choices, replicas), key=lambda replica: self._reports.get(id(replica), 0))


POLICIES: dict[str, type[Policy]] = {
    "round robin": RoundRobin,
    "load reports": WeightedRoundRobin,
    "two choices, own calls": TwoChoicesByOwnCalls,
    "two choices, rows in responses": TwoChoicesByResponses,
    "two choices, rows every second": TwoChoicesByPeriodicReports,
    "two choices, current rows": TwoChoices,
    "least loaded": LeastLoaded,
}


def _two(choices: random.Random, replicas: Sequence[Replica]) -> tuple[Replica, Replica]:
    return choices.choice(replicas), choices.choice(replicas)
