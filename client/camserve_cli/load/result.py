"""Result of `camserve bench` as terminal tables, notes, JSON, CSV and an HTML page."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from camserve_cli.load.knee import TOLERANCE, Step, best_step
from camserve_cli.load.stats import PERCENTILES, UNFINISHED, Measurement, Summary
from camserve_cli.rich_tables import plain_table

__all__ = ["LoadResult", "notes", "render_tables", "step_line", "to_json", "write_csv", "write_report"]

COLUMNS = (
    "rate", "method", "image", "intended_s", "sent_s", "done_s", "latency_ms", "code", "reason", "rows", "batches",
    "queue_ms", "compute_ms",
)  # fmt: skip
# A sender that is later than this, and later than a tenth of the median latency, distorts the measurement.
_LATE_MS = 10.0


@dataclass(frozen=True)
class LoadResult:
    """Result of a load.

    Attributes:
        measured: The measurement. For a knee it is the measurement at the knee, or at the last rate if no rate met the
            bound.
        methods: Labels of the methods.
        steps: Rates of the search for the knee.
        bound_s: Bound of the 99th percentile of latency, in seconds, for a knee.
        facts: Description of the load and of the server.
        interrupted: True if Ctrl-C ended the load.
        summaries: A summary of each method, if there are several, and then the summary of all methods.
    """

    measured: Measurement
    methods: Sequence[str]
    steps: Sequence[Step]
    bound_s: float | None
    facts: Mapping[str, str]
    interrupted: bool
    summaries: list[Summary] = field(init=False)

    def __post_init__(self) -> None:
        several = self.methods if len(self.methods) > 1 else []
        each = [self.measured.summary(method) for method in several]
        object.__setattr__(self, "summaries", [*each, self.measured.summary()])

    @property
    def title(self) -> str:
        """Main result in one line."""
        if self.bound_s is None:
            return f"{_number(self.summaries[-1].requests_per_s)} answers per second"
        best = best_step(self.steps)
        within = f"p99 within {self.bound_s:g} s"
        if best is None:
            least = min(step.rate for step in self.steps)
            return f"no rate found with {within}: {_number(least)} requests per second miss it"
        missed = [step.rate for step in self.steps if step.rate > best.rate]
        if not missed:
            return f"{within} up to {_number(best.rate)} requests per second, the highest rate that was tried"
        exact = min(missed) <= best.rate * (1 + TOLERANCE)
        precision = f"to {TOLERANCE:.0%}" if exact else f"but not at {_number(min(missed))}"
        return f"{within} up to {_number(best.rate)} requests per second, {precision}"


def notes(result: LoadResult) -> Iterator[str]:
    """Yield remarks without which a reader could misunderstand the result."""
    if result.interrupted:
        yield "interrupted before the knee was found" if result.bound_s else "interrupted before the end"
    total = result.summaries[-1]
    if unfinished := total.errors.get(UNFINISHED):
        yield f"{unfinished} requests were still pending at the end; their latencies count up to that time"
    late = total.sent_late_ms.get("p99", 0)
    if late > max(_LATE_MS, total.latency_ms.get("p50", 0) / 10):
        yield (
            f"the sender itself was late, by {_number(late)} ms at the 99th percentile, and the latencies include this "
            "delay: the load exceeds what this machine, or one process, can send"
        )
    if 0 < total.requests < 100:
        yield (
            f"the p99 of only {total.requests} requests is the latency of the slowest one; "
            "measure longer with --duration"
        )


def step_line(step: Step) -> str:
    """Describe one rate of the search for the knee in one line."""
    latency = step.summary.latency_ms
    p99 = f"p99 {_number(latency['p99'])} ms" if latency else "no answers"
    outcome = "within the bound" if step.met else "not within the bound" + ", ended early" * step.dropped
    failed = sum(step.summary.errors.values())
    return f"{_number(step.rate)}/s: {p99}, {outcome}" + f", {failed} not answered" * bool(failed)


def render_tables(result: LoadResult) -> RenderableType:
    """Return the tables for the terminal."""
    parts: list[RenderableType] = [Text(result.title, style="bold"), ""]
    if result.steps:
        rates = plain_table("sent/s", "answers/s", "rows/s", "requests", "errors", "p50 ms", "p99 ms", "within")
        for step in sorted(result.steps, key=lambda step: step.rate):
            total, latency = step.summary, step.summary.latency_ms
            rates.add_row(
                *map(_number, (step.rate, total.requests_per_s, total.rows_per_s)),
                f"{total.requests:,}",
                f"{sum(total.errors.values()):,}",
                *(_number(latency[name]) if latency else "–" for name in ("p50", "p99")),
                "yes" if step.met else "no, early" if step.dropped else "no",
            )
        at = result.measured.rate or 0
        parts += [rates, "", Text(f"at {_number(at)} requests per second:", style="bold"), ""]
    throughput = plain_table("method", "requests", "answered", "answers/s", "rows/s", "errors")
    times = plain_table("milliseconds", "method", *PERCENTILES)
    for each in result.summaries:
        errors = ", ".join(f"{name}: {count:,}" for name, count in each.errors.items()) or "none"
        counts = (f"{each.requests:,}", f"{each.answered:,}", _number(each.requests_per_s), _number(each.rows_per_s))
        throughput.add_row(escape(each.method), *counts, errors)
    kinds = {"latency": "latency_ms", "queue": "queue_ms", "compute": "compute_ms"}
    for kind, name in kinds.items():
        for each in result.summaries:
            if values := getattr(each, name):
                times.add_row(kind, escape(each.method), *(_number(values[percentile]) for percentile in PERCENTILES))
    parts += [throughput, "", times]
    if result.measured.fill is not None:
        parts += ["", f"{result.measured.fill:.1%} of the rows in the server's batches were real rows"]
    return Group(*parts)


def to_json(result: LoadResult) -> dict[str, Any]:
    """Return the result as a JSON object."""
    return {
        "load": dict(result.facts),
        "interrupted": result.interrupted,
        "rate": result.measured.rate,
        "seconds": result.measured.seconds,
        "fill": result.measured.fill,
        "summaries": [asdict(each) for each in result.summaries],
        "knee": None if (best := best_step(result.steps)) is None else best.rate,
        "steps": [
            {
                "rate": step.rate,
                "met": step.met,
                "dropped": step.dropped,
                "fill": step.measured.fill,
                "summary": asdict(step.summary),
            }
            for step in result.steps
        ],
    }


def write_csv(path: Path, measurements: Sequence[Measurement]) -> None:
    """Write a row for each request that was intended to be sent during a measurement.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for measured in measurements:
            rate = "" if measured.rate is None else f"{measured.rate:.6g}"
            for each in measured.records:
                if 0 <= each.intended_s < measured.seconds:
                    times = (each.intended_s, each.sent_s, each.done_s)
                    outcome = [f"{1e3 * each.latency_s:.3f}", each.code, each.reason, each.rows, each.batches]
                    ms = [f"{value:.3f}" for value in (each.queue_ms, each.compute_ms)]
                    writer.writerow([rate, each.method, each.image, *(f"{time:.6f}" for time in times), *outcome, *ms])


def write_report(path: Path, result: LoadResult, command: str) -> None:
    """Write the HTML page. It needs the extra `report`.

    Args:
        path: The file to write.
        result: The result to show.
        command: The command line, which the page quotes.

    Raises:
        OSError: The file cannot be written.
    """
    from camserve_cli.load import page

    fill = result.measured.fill
    with Console(stderr=True).status(f"writing {escape(str(path))}"):
        page.write(
            path,
            title=result.title,
            measured=result.measured,
            methods=result.methods,
            steps=result.steps,
            bound_s=result.bound_s,
            facts=result.facts if fill is None else {**result.facts, "batches": f"{fill:.1%} real rows"},
            notes=list(notes(result)),
            command=command,
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"
