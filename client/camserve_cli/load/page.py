"""HTML page of a load, written by `camserve bench --report`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from camserve_cli.load import knee, stats
from camserve_cli.load.knee import Step
from camserve_cli.load.stats import Measurement, Record, Summary
from camserve_cli.report import charts, html
from camserve_cli.report.charts import Line
from camserve_cli.report.figures import Figure

__all__ = ["write"]

# Shares at which the percentile curve has its points. On the axis of the chart, 90 %, 99 %, 99.9 % and so on have equal
# distances, and so have these shares.
_SHARES = 1 - np.logspace(0, -5, 101)


def write(
    path: str | os.PathLike[str],
    *,
    title: str,
    measured: Measurement,
    methods: Sequence[str],
    steps: Sequence[Step] = (),
    bound_s: float | None = None,
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    command: str = "",
) -> None:
    """Write the report of a load atomically.

    Args:
        path: The file to write.
        title: Main result in one line.
        measured: The recorded requests. For a knee these are the requests at the knee, or at the last rate if no rate
            met the bound.
        methods: Labels of the methods.
        steps: Rates of the search for the knee.
        bound_s: Bound of the 99th percentile of latency, in seconds, for a knee.
        facts: Description of the load and of the server, by name.
        notes: Remarks without which a reader could misunderstand the figures.
        command: The command line, which the page quotes.

    Raises:
        OSError: The file cannot be written.
    """
    page = {
        "title": title,
        "percentiles": [*stats.PERCENTILES],
        "measured": measured,
        "summaries": [*(measured.summary(each) for each in methods if len(methods) > 1), measured.summary()],
        "figures": _figures(measured.records, measured.seconds, methods),
        "steps": sorted(steps, key=lambda step: step.rate),
        "knee": knee.best_step(steps),
        "knee_figures": _knee_figures(steps, bound_s) if bound_s else [],
        "bound_ms": 1e3 * (bound_s or 0),
        "facts": facts,
        "notes": notes,
        "command": command,
    }
    html.write_page(path, html.environment(), "load.html.j2", page)


def _figures(records: Sequence[Record], seconds: float, methods: Sequence[str]) -> list[Figure]:
    series = stats.time_series(records, seconds)
    interval = f"in intervals of {2 * series.middle_s[0]:.4g} s"
    latencies = [
        Line("longest", series.middle_s, series.max_ms),
        Line("p99", series.middle_s, series.p99_ms),
        Line("median", series.middle_s, series.p50_ms),
    ]
    rates = [
        Line("answered", series.middle_s, series.answered_per_s),
        Line("sent", series.middle_s, series.intended_per_s),
        Line("failed", series.middle_s, series.failed_per_s),
    ]
    selected = [None, *methods[: charts.MAX_LINES - 1]] if len(methods) > 1 else [None]
    curves = [line for method in selected if (line := _percentile_curve(records, seconds, method))]
    ticks = {"0": 1.0, "50": 2.0, "90": 10.0, "99": 1e2, "99.9": 1e3, "99.99": 1e4, "99.999": 1e5}
    throughput = Figure(
        charts.lines("Throughput over time.", rates, "time, s", "requests per second"),
        "Throughput over time",
        interval,
    )
    if not curves:
        return [throughput]
    longest = max(float(line.x[-1]) for line in curves)
    return [
        Figure(
            charts.lines("Latency over time.", latencies, "time, s", "latency, ms", log_y=True),
            "Latency over time",
            interval,
        ),
        Figure(
            charts.lines(
                "Percentiles of latency.",
                curves,
                "share of requests, %",
                "maximum latency of this share, ms",
                log_x=True,
                log_y=True,
                x_ticks={text: at for text, at in ticks.items() if at <= longest},
            ),
            "Percentiles of latency",
            "all requests",
        ),
        throughput,
    ]


def _percentile_curve(records: Sequence[Record], seconds: float, method: str | None) -> Line | None:
    selected = [each for each in records if method in (None, each.method) and 0 <= each.intended_s < seconds]
    latencies = [1e3 * each.latency_s for each in selected if each.has_latency]
    shares = _SHARES[(1 - _SHARES) * len(latencies) >= 1]
    if not shares.size:
        return None
    values = np.array(stats.quantiles(latencies, shares))
    return Line("all" if method is None else method, 1 / (1 - shares), values)


def _knee_figures(steps: Sequence[Step], bound_s: float) -> list[Figure]:
    ordered = [step for step in sorted(steps, key=lambda step: step.rate) if step.summary.latency_ms]
    if not ordered:
        return []
    rate = np.array([step.rate for step in ordered])

    def line(label: str, value: Callable[[Summary], float], dropped: bool = False) -> Line:
        """Return a line over the rates. Rates that ended early have incomplete figures and are left out by default."""
        values = [value(step.summary) if dropped or not step.dropped else np.nan for step in ordered]
        return Line(label, rate, np.array(values))

    latency = [
        line("p99", lambda summary: summary.latency_ms["p99"], dropped=True),
        line("p50", lambda summary: summary.latency_ms["p50"]),
        Line("bound", rate, np.array([1e3 * bound_s]), level=True),
    ]
    answered = [line("answered", lambda summary: summary.requests_per_s), Line("sent", rate, rate)]
    label = "requests sent per second"
    return [
        Figure(
            charts.lines("Latency over rate.", latency, label, "latency, ms", log_x=True, log_y=True),
            "Latency over rate",
            "p99 of rates that ended early: up to their end",
        ),
        Figure(
            charts.lines("Answers over rate.", answered, label, "answers per second", log_x=True, log_y=True),
            "Answers over rate",
            "without rates that ended early",
        ),
    ]
