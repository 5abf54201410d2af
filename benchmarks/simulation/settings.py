"""Settings of the simulation, and the form of its questions and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.results import Table
from benchmarks.simulation.plots import Lines
from benchmarks.simulation.profile import Profile
from benchmarks.simulation.run import Ended, Scenario

MIX = {"grad-cam": 0.8, "score-cam": 0.1, "poly-cam": 0.05, "opti-cam": 0.05}
SOON_S = 1.0
TITLES = {"grad-cam": "Grad-CAM", "score-cam": "Score-CAM", "poly-cam": "Poly-CAM", "opti-cam": "Opti-CAM"}


@dataclass(frozen=True)
class Settings:
    """Size of the simulation.

    Attributes:
        profile: Times of each replica.
        capacity: Requests per second that one replica completes.
        mix: Share of the requests by name of the method.
        loads: Loads as shares of the capacity.
        replicas: Numbers of replicas.
        day_load: Load at the peak of the day.
        zone_replicas: Number of replicas that lose a zone.
        zone_s: Seconds before, during and after the loss of a zone.
        policy_replicas: Number of replicas behind the compared policies.
        clients: Numbers of clients with which policies are compared.
        requests: Approximate number of requests after which a simulation ends, if `shortest_s` is over.
        warm_up_s: Seconds at the start whose requests do not count.
        settled_s: Seconds at the start that do not count where numbers of replicas are compared. With many replicas,
            latencies rise during this time.
        shortest_s: Fewest seconds whose requests count.
        seed: Seed of all random numbers.
    """

    profile: Profile
    capacity: float
    mix: Mapping[str, float]
    loads: Sequence[float] = (0.3, 0.5, 0.7, 0.8, 0.9)
    replicas: Sequence[int] = (1, 3, 10, 30, 100, 1000)
    day_load: float = 0.8
    zone_replicas: int = 12
    zone_s: tuple[float, float, float] = (60.0, 180.0, 120.0)
    policy_replicas: int = 30
    clients: Sequence[int] = (1, 10, 100, 1000)
    requests: int = 10_000
    warm_up_s: float = 15.0
    settled_s: float = 75.0
    shortest_s: float = 15.0
    seed: int = 0

    def steady(
        self,
        load: float,
        replicas: int,
        policy: str = "load reports",
        clients: int = 100,
        start_s: float | None = None,
    ) -> Scenario:
        """Return a scenario with a constant rate of requests, which count after `start_s`, by default `warm_up_s`."""
        start_s = self.warm_up_s if start_s is None else start_s
        counted_s = max(self.shortest_s, self.requests / (load * self.capacity * replicas))
        return self.scenario(load, start_s + counted_s, replicas=replicas, policy=policy, clients=clients)

    def scenario(self, load: float, seconds: float, **options: object) -> Scenario:
        """Return a scenario with this profile and mix."""
        common = partial(Scenario, self.profile, self.mix, self.capacity, seed=self.seed)
        return common(load, seconds, **options)  # type: ignore[arg-type]  # the options are those of Scenario


@dataclass(frozen=True)
class Answer:
    """Answer to a question.

    Attributes:
        text: Paragraph of the page.
        tables: Tables of the section.
        lines: Charts of the section.
    """

    text: str
    tables: Sequence[Table]
    lines: Sequence[Lines]


@dataclass(frozen=True)
class Study:
    """A question.

    Attributes:
        title: Heading of the section.
        scenarios: Returns the scenarios to simulate.
        answer: Returns the answer, from the settings and the results of the scenarios in their order.
    """

    title: str
    scenarios: Callable[[Settings], Sequence[Scenario]]
    answer: Callable[[Settings, Iterable[tuple[Scenario, Ended]]], Answer]
