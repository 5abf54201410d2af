"""The page of a load: `camserve bench --report`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from camserve_cli.load import knee, stats
from camserve_cli.load.knee import Step
from camserve_cli.load.stats import Measured, Record, Summary
from camserve_cli.report import charts, html
from camserve_cli.report.charts import Line
from camserve_cli.report.figures import Figure

__all__ = ["write"]

# Where the percentile curve has its points: evenly on its axis, on which 90 %, 99 %, 99.9 % … are equally far apart.
_AT = 1 - np.logspace(0, -5, 101)


def write(
    path: str | os.PathLike[str],
    *,
    title: str,
    measured: Measured,
    methods: Sequence[str],
    steps: Sequence[Step] = (),
    bound_s: float | None = None,
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    command: str = "",
) -> None:
    """Write the report of a load into `path`, in one step. Raises OSError.

    measured: what was recorded; of a knee, at it, or at the last rate that was tried.
    steps, bound_s: the rates that were tried for the knee, and its bound.
    facts: what was asked of whom, and how; notes: what a reader must know.
    """
    page = {
        "title": title,
        "levels": [*stats.LEVELS],
        "measured": measured,
        "summaries": [*(measured.summary(each) for each in methods if len(methods) > 1), measured.summary()],
        "figures": _figures(measured.records, measured.seconds, methods),
        "steps": sorted(steps, key=lambda step: step.rate),
        "knee": knee.highest(steps),
        "knee_figures": _knee_figures(steps, bound_s) if bound_s else [],
        "bound_ms": 1e3 * (bound_s or 0),
        "facts": facts,
        "notes": notes,
        "command": command,
    }
    html.write_page(path, html.environment(), "load.html.j2", page)


def _figures(records: Sequence[Record], seconds: float, methods: Sequence[str]) -> list[Figure]:
    over = stats.over_time(records, seconds)
    span = f"{2 * over.middle_s[0]:.2g} s"
    time = [
        Line("longest", over.middle_s, over.max_ms),
        Line("p99", over.middle_s, over.p99_ms),
        Line("median", over.middle_s, over.p50_ms),
    ]
    rates = [
        Line("answered", over.middle_s, over.answered_per_s),
        Line("asked for", over.middle_s, over.meant_per_s),
        Line("failed", over.middle_s, over.failed_per_s),
    ]
    shown = [None, *methods[: charts.MOST_LINES - 1]] if len(methods) > 1 else [None]
    curves = [line for method in shown if (line := _percentile_curve(records, seconds, method))]
    ticks = {"0": 1.0, "50": 2.0, "90": 10.0, "99": 1e2, "99.9": 1e3, "99.99": 1e4, "99.999": 1e5}
    throughput = Figure(
        charts.lines("Throughput over time.", rates, "seconds", "requests a second"),
        "Throughput over time",
        f"in spans of {span}",
    )
    if not curves:
        return [throughput]
    longest = max(float(line.x[-1]) for line in curves)
    return [
        Figure(
            charts.lines("Latency over time.", time, "seconds", "latency, ms", log_y=True),
            "Latency over time",
            f"in spans of {span}",
        ),
        Figure(
            charts.lines(
                "Percentiles of latency.",
                curves,
                "percent of requests",
                "latency within which they came, ms",
                log_x=True,
                log_y=True,
                x_ticks={text: at for text, at in ticks.items() if at <= longest},
            ),
            "Percentiles of latency",
            "of all requests",
        ),
        throughput,
    ]


def _percentile_curve(records: Sequence[Record], seconds: float, method: str | None) -> Line | None:
    mine = [each for each in records if method in (None, each.method) and 0 <= each.intended_s < seconds]
    latencies = [1e3 * each.latency_s for each in mine if each.waited]
    at = _AT[(1 - _AT) * len(latencies) >= 1]
    if not at.size:
        return None
    return Line("all" if method is None else method, 1 / (1 - at), np.array(stats.quantiles(latencies, at)))


def _knee_figures(steps: Sequence[Step], bound_s: float) -> list[Figure]:
    ordered = [step for step in sorted(steps, key=lambda step: step.rate) if step.summary.latency_ms]
    if not ordered:
        return []
    rate = np.array([step.rate for step in ordered])

    def line(label: str, value: Callable[[Summary], float], dropped: bool = False) -> Line:
        """Without the rates that were dropped, whose figures are of their first moments, unless it says so."""
        given = [value(step.summary) if dropped or not step.dropped else np.nan for step in ordered]
        return Line(label, rate, np.array(given))

    latency = [
        line("p99", lambda of: of.latency_ms["p99"], dropped=True),
        line("p50", lambda of: of.latency_ms["p50"]),
        Line("bound", rate, np.array([1e3 * bound_s]), level=True),
    ]
    answered = [line("answered", lambda of: of.requests_per_s), Line("asked for", rate, rate)]
    label = "requests a second that were asked for"
    return [
        Figure(
            charts.lines("Latency over rate.", latency, label, "latency, ms", log_x=True, log_y=True),
            "Latency over rate",
            "of rates that were given up: by then",
        ),
        Figure(
            charts.lines("Answers over rate.", answered, label, "answers a second", log_x=True, log_y=True),
            "Answers over rate",
            "without those",
        ),
    ]
