"""What `camserve bench` measured, as tables, notes, JSON, CSV and a page."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from camserve_cli.load.knee import TOLERANCE, Step, highest
from camserve_cli.load.stats import LEVELS, UNFINISHED, Measured, Summary
from camserve_cli.rich_tables import plain_table

__all__ = ["Result", "notes", "record", "step_line", "tables", "write_csv", "write_report"]

COLUMNS = (
    "rate", "method", "image", "intended_s", "sent_s", "done_s", "latency_ms", "code", "reason", "rows", "batches",
    "queue_ms", "compute_ms",
)  # fmt: skip
# A sender that is later than this, and than a tenth of the median latency, has a part in what it measures.
_LATE_MS = 10.0


@dataclass(frozen=True)
class Result:
    """What was measured; of a knee at it, or at the last rate that was tried. `facts` is what was asked of whom."""

    measured: Measured
    methods: Sequence[str]
    steps: Sequence[Step]
    bound_s: float | None
    facts: Mapping[str, str]
    interrupted: bool
    summaries: list[Summary] = field(init=False)

    def __post_init__(self) -> None:
        """`summaries` is that of each method, if there are several, and that of all."""
        several = self.methods if len(self.methods) > 1 else []
        each = [self.measured.summary(method) for method in several]
        object.__setattr__(self, "summaries", [*each, self.measured.summary()])

    @property
    def title(self) -> str:
        """What it comes to."""
        if self.bound_s is None:
            return f"{_number(self.summaries[-1].requests_per_s)} answers a second"
        best = highest(self.steps)
        within = f"p99 within {self.bound_s:g} s"
        if best is None:
            least = min(step.rate for step in self.steps)
            return f"no rate was found with {within}: at {_number(least)} requests a second it is not"
        missed = [step.rate for step in self.steps if step.rate > best.rate]
        if not missed:
            return f"{within} up to {_number(best.rate)} requests a second, the highest rate that was tried"
        exact = min(missed) <= best.rate * (1 + TOLERANCE)
        to = f"to {TOLERANCE:.0%}" if exact else f"and not at {_number(min(missed))}"
        return f"{within} up to {_number(best.rate)} requests a second, {to}"


def notes(result: Result) -> Iterator[str]:
    """What a reader of the figures must know."""
    if result.interrupted:
        yield "interrupted before the knee was found" if result.bound_s else "interrupted before its time"
    every = result.summaries[-1]
    if unfinished := every.errors.get(UNFINISHED):
        yield f"{unfinished} requests were still on their way, and count with what they had waited by then"
    late = every.sent_late_ms.get("p99", 0)
    if late > max(_LATE_MS, every.latency_ms.get("p50", 0) / 10):
        yield (
            f"the sender was late itself, by {_number(late)} ms for one request in a hundred, which is in the "
            "latencies: it asks for more than this machine, or one process, can send"
        )
    if 0 < every.requests < 100:
        yield f"the p99 of {every.requests} requests is that of the slowest: measure for longer"


def step_line(step: Step) -> str:
    """A rate that was tried, as soon as it is done."""
    latency = step.summary.latency_ms
    p99 = f"p99 {_number(latency['p99'])} ms" if latency else "nothing came"
    said = "within the bound" if step.met else "not within the bound" + ", given up early" * step.dropped
    failed = sum(step.summary.errors.values())
    return f"{_number(step.rate)}/s: {p99}, {said}" + f", {failed} not answered" * bool(failed)


def tables(result: Result) -> RenderableType:
    """Throughput, latencies, and the rates that were tried."""
    parts: list[RenderableType] = [Text(result.title, style="bold"), ""]
    if result.steps:
        rates = plain_table("asked for/s", "answers/s", "rows/s", "requests", "errors", "p50", "p99 ms", "within")
        for step in sorted(result.steps, key=lambda step: step.rate):
            of, latency = step.summary, step.summary.latency_ms
            rates.add_row(
                *map(_number, (step.rate, of.requests_per_s, of.rows_per_s)),
                f"{of.requests:,}",
                f"{sum(of.errors.values()):,}",
                *(_number(latency[level]) if latency else "–" for level in ("p50", "p99")),
                "yes" if step.met else "no, early" if step.dropped else "no",
            )
        at = result.measured.rate or 0
        parts += [rates, "", Text(f"at {_number(at)} requests a second:", style="bold"), ""]
    throughput = plain_table("method", "requests", "answered", "answers/s", "rows/s", "errors")
    latencies = plain_table("milliseconds", "of", *LEVELS)
    for each in result.summaries:
        errors = ", ".join(f"{name}: {count:,}" for name, count in each.errors.items()) or "none"
        counts = (f"{each.requests:,}", f"{each.answered:,}", _number(each.requests_per_s), _number(each.rows_per_s))
        throughput.add_row(escape(each.method), *counts, errors)
    kinds = {"latency": "latency_ms", "in the queue": "queue_ms", "computed": "compute_ms"}
    for kind, name in kinds.items():
        for each in result.summaries:
            if values := getattr(each, name):
                latencies.add_row(kind, escape(each.method), *(_number(values[level]) for level in LEVELS))
    parts += [throughput, "", latencies]
    if result.measured.fill is not None:
        parts += ["", f"batches were {result.measured.fill:.1%} full"]
    return Group(*parts)


def record(result: Result) -> dict[str, Any]:
    """For JSON."""
    return {
        "load": dict(result.facts),
        "interrupted": result.interrupted,
        "rate": result.measured.rate,
        "seconds": result.measured.seconds,
        "fill": result.measured.fill,
        "summaries": [asdict(each) for each in result.summaries],
        "knee": None if (best := highest(result.steps)) is None else best.rate,
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


def write_csv(path: Path, every: Sequence[Measured]) -> None:
    """A row for each request that was meant to be sent in the time that was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for measured in every:
            rate = "" if measured.rate is None else f"{measured.rate:.6g}"
            for each in measured.records:
                if 0 <= each.intended_s < measured.seconds:
                    times = (each.intended_s, each.sent_s, each.done_s)
                    took = [f"{1e3 * each.latency_s:.3f}", each.code, each.reason, each.rows, each.batches]
                    ms = [f"{value:.3f}" for value in (each.queue_ms, each.compute_ms)]
                    writer.writerow([rate, each.method, each.image, *(f"{time:.6f}" for time in times), *took, *ms])


def write_report(path: Path, result: Result, command: str) -> None:
    """The page. Needs what reports need."""
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
            facts=result.facts if fill is None else {**result.facts, "batches": f"{fill:.1%} full"},
            notes=list(notes(result)),
            command=command,
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"
