"""Statistics of recorded requests. The module has no clock.

Times are in seconds from the end of the warm-up, so requests of the warm-up have negative times. A latency counts if
its request was intended to be sent during the measurement. A rate counts the answers that arrived during the
measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PERCENTILES",
    "UNFINISHED",
    "Measurement",
    "Numbers",
    "Record",
    "Summary",
    "TimeSeries",
    "percentiles",
    "quantiles",
    "summary",
    "time_series",
]

Numbers = NDArray[np.float64]

# Code of a request that was still pending when the load ended.
UNFINISHED = "UNFINISHED"
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


class Record(NamedTuple):
    """Outcome of one request.

    Attributes:
        method: Label of the method.
        image: Index of the image.
        intended_s: Time at which the request was intended to be sent.
        sent_s: Time at which the request was sent.
        done_s: Time at which the answer or the error arrived.
        code: Name of the gRPC status code, or `UNFINISHED`.
        reason: Reason of the error, if the server gave one.
        rows: Rows of the request.
        batches: Batches that contained rows of the request.
        queue_ms: Time in the queue of the server.
        compute_ms: Time from the first batch to the answer.
    """

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
        """Time from the intended send time to the answer, which includes delays of the sender and of the server."""
        return self.done_s - self.intended_s

    @property
    def answered(self) -> bool:
        """True if the server returned an answer."""
        return self.code == "OK"

    @property
    def has_latency(self) -> bool:
        """True if the latency measures a caller's wait.

        A request that was refused at once, or whose connection failed, has no meaningful latency.
        """
        timed_out = self.code == "DEADLINE_EXCEEDED" and self.reason != "DEADLINE_UNREACHABLE"
        return self.answered or timed_out or self.code == UNFINISHED


@dataclass(frozen=True)
class Summary:
    """Statistics of the requests of one method, or of all methods.

    The four mappings from percentiles have the keys of `PERCENTILES`. They are empty if there are no values.

    Attributes:
        method: Label of the method, or "all".
        requests: Number of requests that were intended to be sent during the measurement.
        answered: Number of these requests that were answered.
        requests_per_s: Answers per second.
        rows_per_s: Rows of the answers per second.
        errors: Number of requests that were not answered, by code and reason.
        latency_ms: Latencies of the requests that were answered, timed out, or are unfinished.
        queue_ms: Time in the queue of the server, of the answered requests.
        compute_ms: Time from the first batch to the answer, of the answered requests.
        sent_late_ms: Delay of the sender itself.
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
    """Return quantiles that are measured values, without interpolation.

    Args:
        values: The measured values.
        at: Shares in [0, 1].

    Returns:
        For each share, the smallest value that at least this share of the values does not exceed. The list is empty
        if there are no values.
    """
    result: list[float] = np.quantile(values, at, method="inverted_cdf").tolist() if len(values) else []
    return result


def percentiles(values: Sequence[float] | Numbers) -> dict[str, float]:
    """Return the percentiles of the values, by the names of `PERCENTILES`. Without values the result is empty."""
    return dict(zip(PERCENTILES, quantiles(values, list(PERCENTILES.values())), strict=True)) if len(values) else {}


def summary(records: Sequence[Record], seconds: float, method: str | None = None) -> Summary:
    """Summarise the requests of a method, or of all methods.

    Args:
        records: All recorded requests, including those of the warm-up.
        seconds: Duration of the measurement.
        method: Label of the method. None selects all methods.
    """
    selected = [each for each in records if method in (None, each.method)]
    intended = [each for each in selected if 0 <= each.intended_s < seconds]
    answered = [each for each in intended if each.answered]
    arrived = [each for each in selected if each.answered and 0 <= each.done_s < seconds]
    errors = Counter(" ".join(filter(None, (each.code, each.reason))) for each in intended if not each.answered)
    return Summary(
        method="all" if method is None else method,
        requests=len(intended),
        answered=len(answered),
        requests_per_s=len(arrived) / seconds,
        rows_per_s=sum(each.rows for each in arrived) / seconds,
        errors=dict(errors.most_common()),
        latency_ms=percentiles([1e3 * each.latency_s for each in intended if each.has_latency]),
        queue_ms=percentiles([each.queue_ms for each in answered]),
        compute_ms=percentiles([each.compute_ms for each in answered]),
        sent_late_ms=percentiles([1e3 * (each.sent_s - each.intended_s) for each in intended]),
    )


@dataclass(frozen=True)
class Measurement:
    """Records of one load.

    Attributes:
        rate: Requests per second of an open loop. None for a closed loop.
        seconds: Duration of the measurement.
        records: All recorded requests, including those of the warm-up.
        fill: Share of real rows in the server's batches, in [0, 1]. None if it is not known.
    """

    rate: float | None
    seconds: float
    records: Sequence[Record] = field(repr=False)
    fill: float | None = None

    def summary(self, method: str | None = None) -> Summary:
        """Summarise the requests of a method, or of all methods if `method` is None."""
        return summary(self.records, self.seconds, method)


@dataclass(frozen=True)
class TimeSeries:
    """Rates and latencies in B intervals of equal length, each an array [B].

    A latency belongs to the interval of its intended send time, and is NaN in an interval without requests. A rate
    counts the answers and errors that arrived in the interval.

    Attributes:
        middle_s: Middle of each interval.
        intended_per_s: Requests that were intended to be sent.
        answered_per_s: Answers.
        failed_per_s: Errors.
        p50_ms: Median latency.
        p99_ms: 99th percentile of latency.
        max_ms: Longest latency.
    """

    middle_s: Numbers
    intended_per_s: Numbers
    answered_per_s: Numbers
    failed_per_s: Numbers
    p50_ms: Numbers
    p99_ms: Numbers
    max_ms: Numbers


def time_series(records: Sequence[Record], seconds: float) -> TimeSeries:
    """Divide the measurement into 5 to 60 intervals of about ten requests or more each."""
    requests = sum(0 <= each.intended_s < seconds for each in records)
    edges = np.linspace(0, seconds, min(60, max(5, requests // 10)) + 1)

    def rate(times: Sequence[float]) -> Numbers:
        return np.histogram(times, edges)[0] / np.diff(edges)

    timed = [each for each in records if each.has_latency and 0 <= each.intended_s < seconds]
    place = np.searchsorted(edges, [each.intended_s for each in timed], side="right") - 1
    latency = np.array([1e3 * each.latency_s for each in timed])
    latencies = [quantiles(latency[place == i], (0.5, 0.99, 1)) or [np.nan] * 3 for i in range(len(edges) - 1)]
    p50, p99, longest = np.array(latencies).T
    return TimeSeries(
        middle_s=(edges[:-1] + edges[1:]) / 2,
        intended_per_s=rate([each.intended_s for each in records]),
        answered_per_s=rate([each.done_s for each in records if each.answered]),
        failed_per_s=rate([each.done_s for each in records if not each.answered]),
        p50_ms=p50,
        p99_ms=p99,
        max_ms=longest,
    )
