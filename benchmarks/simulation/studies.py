"""The questions that the simulation answers, as scenarios and their results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from benchmarks.results import Table
from benchmarks.simulation.balancing import POLICIES
from benchmarks.simulation.plots import Lines
from benchmarks.simulation.run import Ended, Scenario, ZoneLoss
from benchmarks.simulation.settings import SOON_S, TITLES, Answer, Settings, Study

HOURS = 24

# ---- load ------------------------------------------------------------------------------------------------------------


def _load_scenarios(settings: Settings) -> Sequence[Scenario]:
    return [
        settings.steady(load, replicas, start_s=settings.settled_s)
        for replicas in settings.replicas
        for load in (settings.loads if replicas <= _MANY else [_middle(settings)])
    ] + [
        settings.steady(load, _most(settings), clients=_MORE_CLIENTS, start_s=settings.settled_s)
        for load in settings.loads
    ]


_MANY = 100  # more replicas take minutes for each load
_MORE_CLIENTS = 1_000


def _most(settings: Settings) -> int:
    """Return the number of replicas that are simulated with more clients, too."""
    return max((r for r in settings.replicas if r <= _MANY), default=max(settings.replicas))


def _middle(settings: Settings) -> float:
    return settings.loads[len(settings.loads) // 2]


def _load_answer(settings: Settings, results: Iterable[tuple[Scenario, Ended]]) -> Answer:
    shares: dict[int, dict[float, float]] = {}
    methods: dict[float, list[str]] = {}
    by_method: dict[str, list[tuple[float, float]]] = {}
    more_clients: dict[float, float] = {}
    most = _most(settings)
    for scenario, ended in results:
        counted = ended.since(settings.settled_s)
        if scenario.clients == _MORE_CLIENTS:
            more_clients[scenario.load] = counted.within(SOON_S)
            continue
        shares.setdefault(scenario.replicas, {})[scenario.load] = counted.within(SOON_S)
        if scenario.replicas == most:
            parts = {TITLES[m]: counted.of(m) for m in settings.mix}
            cells = [f"{part.within(SOON_S):.1%} / {_s(part.percentile(0.99))}" for part in parts.values()]
            methods[scenario.load] = [f"{scenario.load:.0%}", *cells]
            for title, part in parts.items():
                by_method.setdefault(title, []).append((scenario.load, part.within(SOON_S)))
    rows = [
        [f"{r:,}", *(f"{by_load[load]:.1%}" if load in by_load else "–" for load in settings.loads)]
        for r, by_load in shares.items()
    ]
    rows.append([f"{most:,}, {_MORE_CLIENTS:,} clients", *(f"{more_clients[load]:.1%}" for load in settings.loads)])
    columns = [[by_load[load] for by_load in shares.values() if load in by_load] for load in settings.loads]
    spread = max((max(column) - min(column) for column in columns if column), default=0.0)
    text = (
        f"Share of the requests with a result within {SOON_S:g} s. Each replica has a queue of its own, and a request "
        "does not move to another one, so more replicas carry more requests but hardly make them faster: the shares of "
        f"one column differ by at most {100 * spread:.1f} percentage points. The scheduler runs the shortest request "
        f"first, so long methods wait. The first {settings.settled_s:.0f} s do not count, because the shares of many "
        "replicas with 100 clients fall during this time. The likely reason: each client visits the replicas in the "
        "same order and skips busy ones, so the places of the clients in this order come together, and they send long "
        "requests to the same replicas. With more clients than replicas, this hardly matters, see the last line."
    )
    return Answer(
        text,
        [
            Table("", ["replicas", *(f"load {load:.0%}" for load in settings.loads)], rows),
            Table(
                f"By method, with {most:,} replicas: share within {SOON_S:g} s / p99 in seconds. Opti-CAM takes more "
                f"than {SOON_S:g} s even alone.",
                ["load", *(TITLES[m] for m in settings.mix)],
                [*methods.values()],
            ),
        ],
        [
            Lines(
                f"Requests with a result within {SOON_S:g} s",
                "load (share of the capacity)",
                "share",
                {_replicas(r): [*by_load.items()] for r, by_load in shares.items()},
            ),
            Lines(
                f"Requests with a result within {SOON_S:g} s by method, {_replicas(most)}",
                "load (share of the capacity)",
                "share",
                by_method,
            ),
        ],
    )


# ---- day -------------------------------------------------------------------------------------------------------------


def day_curve(hour: float) -> float:
    """Return the requests per second as a share of those of the peak at 14 o'clock; at 2 o'clock it is a tenth."""
    return 0.1 + 0.9 * math.sin(math.pi * (hour - 2) / HOURS) ** 2


MEAN_OF_DAY = 0.55  # of `day_curve`


def _hour_s(settings: Settings, replicas: int) -> float:
    """Return the simulated seconds of an hour: as long as the requests permit, from `shortest_s` / 5 to an hour."""
    rate = settings.day_load * settings.capacity * replicas * MEAN_OF_DAY
    return min(3600.0, max(settings.shortest_s / 5, 5 * settings.requests / rate / HOURS))


def _day_scenarios(settings: Settings) -> Sequence[Scenario]:
    scenarios = []
    for replicas in settings.replicas:
        hour_s = _hour_s(settings, replicas)
        curve = partial(_curve_of_short_hours, hour_s)
        scenarios.append(settings.scenario(settings.day_load, HOURS * hour_s, curve=curve, replicas=replicas))
    return scenarios


def _curve_of_short_hours(hour_s: float, time: float) -> float:
    return day_curve(time / hour_s)


def _day_answer(settings: Settings, results: Iterable[tuple[Scenario, Ended]]) -> Answer:
    rows, lines = [], {}
    for scenario, ended in results:
        hour_s = scenario.seconds / HOURS
        hours = [ended.since(hour * hour_s, (hour + 1) * hour_s) for hour in range(HOURS)]
        shares = [hour.within(SOON_S) for hour in hours]
        lines[_replicas(scenario.replicas)] = [(h + 0.5, share) for h, share in enumerate(shares)]
        worst = int(np.argmin(shares))
        rows.append(
            [
                f"{scenario.replicas:,}",
                f"{hour_s:.0f} s",
                f"{len(ended.sent):,}",
                f"{ended.within(SOON_S):.1%}",
                f"{shares[worst]:.1%}, {worst} to {worst + 1} o'clock",
                _s(ended.percentile(0.99)),
                f"{ended.status('OK'):.2%}",
            ]
        )
    text = (
        f"A day whose rate of requests has its peak at 14 o'clock ({settings.day_load:.0%} of the capacity) and its "
        "minimum, a tenth of the peak, at 2 o'clock. An hour is simulated by fewer seconds, because a thousand "
        f"replicas serve {settings.day_load * settings.capacity * 1000 * MEAN_OF_DAY * 86400 / 1e6:,.0f} million "
        "requests a day. If an hour has a few seconds, requests that wait longer carry over to the next hours, so "
        "the peak looks milder than it is. With as many replicas as clients or more, the hours after the peak do not "
        "become as good again as those before it, for the reason that the section above gives."
    )
    columns = ["replicas", "an hour", "requests", f"within {SOON_S:g} s", "worst hour", "p99", "with a result"]
    chart = Lines(f"A day: requests with a result within {SOON_S:g} s", "hour", "share", lines)
    return Answer(text, [Table("", columns, rows)], [chart])


# ---- loss of a zone --------------------------------------------------------------------------------------------------

_BIN_S = 10.0
_NOTICED_S = (0.0, 10.0, 40.0)
_ZONE_LOADS = (0.5, 0.65, 0.8)


def _zone_scenarios(settings: Settings) -> Sequence[Scenario]:
    before_s, lost_s, _ = settings.zone_s
    return [
        settings.scenario(
            load,
            sum(settings.zone_s),
            replicas=settings.zone_replicas,
            loss=ZoneLoss(before_s, lost_s, noticed_s),
        )
        for load in _ZONE_LOADS
        for noticed_s in _NOTICED_S
    ]


def _zone_answer(settings: Settings, results: Iterable[tuple[Scenario, Ended]]) -> Answer:
    rows, lines = [], {}
    before_s, lost_s, _ = settings.zone_s
    end = before_s + lost_s
    for scenario, ended in results:
        assert scenario.loss is not None, "the scenarios of this study lose a zone"
        noticed_s = scenario.loss.noticed_s
        before, lost = ended.since(before_s / 2, before_s), ended.since(before_s, end)
        failed = [f"{ended.status(s):.2%}" for s in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")]
        early = float(np.mean(lost.early)) if len(lost.sent) else math.nan
        rows.append(
            [
                f"{scenario.load:.0%}",
                f"{noticed_s:g} s",
                f"{before.within(SOON_S):.1%}",
                f"{lost.within(SOON_S):.1%}",
                f"{lost.of('grad-cam').within(SOON_S):.1%}",
                f"{early:.1%}",
                *failed,
            ]
        )
        if scenario.load in (_ZONE_LOADS[0], _ZONE_LOADS[-1]) and noticed_s != _NOTICED_S[-1]:
            lines[f"load {scenario.load:.0%}, noticed {f'after {noticed_s:g} s' if noticed_s else 'at once'}"] = [
                (t - before_s, ended.since(t, t + _BIN_S).within(SOON_S))
                for t in np.arange(0, sum(settings.zone_s), _BIN_S)
            ]
    text = (
        f"{settings.zone_replicas} replicas at a constant load lose a third of them for {lost_s:g} s. Clients notice "
        "at once if the connections are reset, for example when a node is drained or a process is killed. If the "
        "machines vanish silently, requests go to them until gRPC finds the connections dead: after about 10 s if the "
        "kernel supports TCP_USER_TIMEOUT, at the latest after 40 s by the client's keep-alive pings. Requests that a "
        "lost replica had admitted end with UNAVAILABLE, because they may have run; the client repeats all others."
    )
    columns = [
        "load",
        "noticed after",
        f"within {SOON_S:g} s before",
        "during the loss",
        "Grad-CAM during the loss",
        "stopped early",
        "UNAVAILABLE",
        "RESOURCE_EXHAUSTED",
        "DEADLINE_EXCEEDED",
    ]
    table = Table("The last three columns are shares of all requests of the simulation:", columns, rows)
    chart = Lines(
        f"Loss of a third of the replicas: results within {SOON_S:g} s", "seconds after the loss", "share", lines
    )
    return Answer(text, [table], [chart])


# ---- load balancing --------------------------------------------------------------------------------------------------


def _policy_scenarios(settings: Settings) -> Sequence[Scenario]:
    replicas = settings.policy_replicas
    middle = _middle(settings)
    return [
        *(settings.steady(load, replicas, policy) for load in settings.loads for policy in POLICIES),
        *(settings.steady(middle, replicas, policy, n) for n in settings.clients for policy in _OF_CLIENTS),
    ]


_OF_CLIENTS = ("round robin", "load reports", "two choices, own calls", "two choices, rows in responses")


def _policy_answer(settings: Settings, results: Iterable[tuple[Scenario, Ended]]) -> Answer:
    compared = len(settings.loads) * len(POLICIES)
    p99: dict[float, dict[str, float]] = {}
    rows: list[list[str]] = []
    by_clients: dict[int, dict[str, float]] = {}
    for number, (scenario, ended) in enumerate(results):
        counted = ended.since(settings.warm_up_s)
        if number >= compared:
            by_clients.setdefault(scenario.clients, {})[scenario.policy] = counted.percentile(0.99)
            continue
        p99.setdefault(scenario.load, {})[scenario.policy] = counted.percentile(0.99)
        rows.append(
            [
                f"{scenario.load:.0%}",
                scenario.policy,
                _s(counted.percentile(0.5)),
                _s(counted.percentile(0.99)),
                *(_s(counted.of(method).percentile(0.99)) for method in settings.mix),
                f"{counted.within(SOON_S):.1%}",
            ]
        )
    return Answer(
        _verdict(settings, p99, by_clients),
        [
            Table(
                "Latency in seconds:",
                ["load", "policy", "p50", "p99", *(f"p99 {TITLES[m]}" for m in settings.mix), f"within {SOON_S:g} s"],
                rows,
            ),
            Table(
                f"p99 in seconds by number of clients, load {_middle(settings):.0%}:",
                ["clients", *_OF_CLIENTS],
                [[f"{n:,}", *(_s(values[policy]) for policy in _OF_CLIENTS)] for n, values in by_clients.items()],
            ),
        ],
        [
            Lines(
                f"p99 latency of {settings.policy_replicas} replicas",
                "load (share of the capacity)",
                "seconds, logarithmic",
                {policy: [(load, p99[load][policy]) for load in p99] for policy in POLICIES},
                logarithmic=True,
            )
        ],
    )


def _verdict(
    settings: Settings, p99: Mapping[float, Mapping[str, float]], by_clients: Mapping[int, Mapping[str, float]]
) -> str:
    """Return the paragraph that says how much round robin loses, and what would help."""

    def loss(policy: str) -> str:
        shares = {load: values[policy] / values["least loaded"] - 1 for load, values in p99.items()}
        return ", ".join(f"{share:.0%} at load {load:.0%}" for load, share in shares.items())

    def shares(policy: str) -> str:
        values = {load: values[policy] / values["round robin"] for load, values in p99.items()}
        return ", ".join(f"{share:.0%} at load {load:.0%}" for load, share in values.items())

    def by(clients: int) -> str:
        values = [f"{policy} {_s(by_clients[clients][policy])} s" for policy in _OF_CLIENTS]
        return f"{clients:,} {'client' if clients == 1 else 'clients'}: {', '.join(values)}"

    text = (
        f"{settings.policy_replicas} replicas, 100 clients. Compared with a balancer that always knows the replica "
        f"with the fewest owed rows, the p99 of round robin is longer by {loss('round robin')}. "
    )
    if all(values["round robin"] <= 1.2 * values["least loaded"] for values in p99.values()):
        return text + "That is at most 20 % at every load, so a better policy would bring little."
    return text + (
        "**That is more than 20 %.** The rows of requests differ by a factor of thousands, and round robin does not "
        "know them: it queues long requests in one replica while others are idle. Short requests hardly notice, "
        "because the scheduler runs them first.\n\n"
        "Therefore the Python client uses gRPC's `weighted_round_robin` with **load reports**: each replica reports "
        "four times a second how long it needs for the rows that it owes, and the share of a replica in the calls of a "
        f"client is inversely proportional to that. Its p99 is longer than that of the least loaded replica by "
        f"{loss('load reports')}, and it takes {shares('load reports')} of the p99 of round robin.\n\n"
        "Other policies: the power of two choices takes two random replicas and calls the one that owes fewer rows. "
        f"With the current numbers, its p99 is longer than that of the least loaded replica by "
        f"{loss('two choices, current rows')}; with numbers that all replicas report once per second, by "
        f"{loss('two choices, rows every second')}. A client that does not know the rows, and compares its own "
        f"unfinished calls, loses {loss('two choices, own calls')}; one that compares the numbers in the last "
        f"responses of the replicas loses {loss('two choices, rows in responses')}. The last two help if few clients "
        f"send all requests (p99 at load {_middle(settings):.0%}; {by(min(by_clients))}; "
        f"{by(max(by_clients))}). A proxy in front of the replicas is such a single client."
    )


def _replicas(number: int) -> str:
    return f"{number:,} {'replica' if number == 1 else 'replicas'}"


def _s(seconds: float) -> str:
    """Return seconds for a table; a failed request counts as infinitely long."""
    return "failed" if math.isinf(seconds) else f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


STUDIES = {
    "load": Study("Requests within one second", _load_scenarios, _load_answer),
    "day": Study("A day", _day_scenarios, _day_answer),
    "zone": Study("Loss of a zone", _zone_scenarios, _zone_answer),
    "balancing": Study("Load balancing", _policy_scenarios, _policy_answer),
}
