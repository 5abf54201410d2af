"""Figures out of what was recorded; pure.

Time runs from the end of the warm-up, whose records have negative times. A latency is that of a request which was meant
to be sent after it, and within the time that is measured. Rates are of answers that came within that time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LEVELS",
    "UNFINISHED",
    "Measured",
    "Numbers",
    "Over",
    "Record",
    "Summary",
    "over_time",
    "percentiles",
    "quantiles",
    "summary",
]

Numbers = NDArray[np.float64]

# Of a request that was still on its way when the load was ended.
UNFINISHED = "UNFINISHED"
LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


class Record(NamedTuple):
    """A request: when it was meant to be sent, when it was, when its answer or error came, and what it took."""

    method: str
    image: int
    intended_s: float
    sent_s: float
    done_s: float
    code: str
    reason: str = ""
    rows: int = 0
    batches: int = 0
    queue_ms: float = 0
    compute_ms: float = 0

    @property
    def latency_s(self) -> float:
        """From when it was meant to be sent: if sender or server fell behind, the wait is in it."""
        return self.done_s - self.intended_s

    @property
    def answered(self) -> bool:
        """Whether it came to an answer."""
        return self.code == "OK"

    @property
    def waited(self) -> bool:
        """Whether the latency says how long a caller waits: not where a request was refused at once or broke."""
        timed_out = self.code == "DEADLINE_EXCEEDED" and self.reason != "DEADLINE_UNREACHABLE"
        return self.answered or timed_out or self.code == UNFINISHED


@dataclass(frozen=True)
class Summary:
    """Of the requests of one method, or of all.

    `errors` counts those that were not answered, by code and reason. `latency_ms` is of those that were answered, timed
    out or are unfinished; `queue_ms` and `compute_ms` are what the server says of those that were answered;
    `sent_late_ms` is by how much the sender itself was late. All four by the names of `LEVELS`, empty of nothing.
    """

    method: str
    requests: int
    answered: int
    requests_per_s: float
    rows_per_s: float
    errors: Mapping[str, int]
    latency_ms: Mapping[str, float] = field(repr=False)
    queue_ms: Mapping[str, float] = field(repr=False)
    compute_ms: Mapping[str, float] = field(repr=False)
    sent_late_ms: Mapping[str, float] = field(repr=False)


def quantiles(values: Sequence[float] | Numbers, at: Sequence[float] | Numbers) -> list[float]:
    """For each share the smallest value that so large a share of the values does not exceed: none is made up."""
    found: list[float] = np.quantile(values, at, method="inverted_cdf").tolist() if len(values) else []
    return found


def percentiles(values: Sequence[float] | Numbers) -> dict[str, float]:
    """By the names of `LEVELS`; empty for no values."""
    return dict(zip(LEVELS, quantiles(values, list(LEVELS.values())), strict=True)) if len(values) else {}


def summary(records: Sequence[Record], seconds: float, method: str | None = None) -> Summary:
    """Of a method, or of all, where the load was measured for so many seconds."""
    mine = [each for each in records if method in (None, each.method)]
    meant = [each for each in mine if 0 <= each.intended_s < seconds]
    answered = [each for each in meant if each.answered]
    came = [each for each in mine if each.answered and 0 <= each.done_s < seconds]
    errors = Counter(" ".join(filter(None, (each.code, each.reason))) for each in meant if not each.answered)
    return Summary(
        method="all" if method is None else method,
        requests=len(meant),
        answered=len(answered),
        requests_per_s=len(came) / seconds,
        rows_per_s=sum(each.rows for each in came) / seconds,
        errors=dict(errors.most_common()),
        latency_ms=percentiles([1e3 * each.latency_s for each in meant if each.waited]),
        queue_ms=percentiles([each.queue_ms for each in answered]),
        compute_ms=percentiles([each.compute_ms for each in answered]),
        sent_late_ms=percentiles([1e3 * (each.sent_s - each.intended_s) for each in meant]),
    )


@dataclass(frozen=True)
class Measured:
    """What was recorded of a load at a rate, None for a closed loop, that was measured for so many seconds.

    `fill` is the share of the server's batches that was rows, and no padding; None where it is not known.
    """

    rate: float | None
    seconds: float
    records: Sequence[Record] = field(repr=False)
    fill: float | None = None

    def summary(self, method: str | None = None) -> Summary:
        """Of a method, or of all."""
        return summary(self.records, self.seconds, method)


@dataclass(frozen=True)
class Over:
    """What happened in each of some equal spans of time, all [B]; `middle_s` is the middle of each.

    Latencies are of requests by when they were meant to be sent, NaN where there was none; rates by when answers and
    errors came.
    """

    middle_s: Numbers
    meant_per_s: Numbers
    answered_per_s: Numbers
    failed_per_s: Numbers
    p50_ms: Numbers
    p99_ms: Numbers
    max_ms: Numbers


def over_time(records: Sequence[Record], seconds: float) -> Over:
    """In spans of some ten requests or more each, on average: at most sixty, and at least five."""
    requests = sum(0 <= each.intended_s < seconds for each in records)
    edges = np.linspace(0, seconds, min(60, max(5, requests // 10)) + 1)

    def rate(times: Sequence[float]) -> Numbers:
        return np.histogram(times, edges)[0] / np.diff(edges)

    waited = [each for each in records if each.waited and 0 <= each.intended_s < seconds]
    place = np.searchsorted(edges, [each.intended_s for each in waited], side="right") - 1
    latency = np.array([1e3 * each.latency_s for each in waited])
    found = [quantiles(latency[place == i], (0.5, 0.99, 1)) or [np.nan] * 3 for i in range(len(edges) - 1)]
    p50, p99, longest = np.array(found).T
    return Over(
        middle_s=(edges[:-1] + edges[1:]) / 2,
        meant_per_s=rate([each.intended_s for each in records]),
        answered_per_s=rate([each.done_s for each in records if each.answered]),
        failed_per_s=rate([each.done_s for each in records if not each.answered]),
        p50_ms=p50,
        p99_ms=p99,
        max_ms=longest,
    )
