"""The documented Prometheus metrics, and the metrics and labels in queries."""

from __future__ import annotations

import re

from tests.processes import ROOT

__all__ = ["PROCESS_METRICS", "documented", "matched_labels", "metrics_in", "named_labels", "series"]

# Metrics of prometheus_client's ProcessCollector that the dashboard or the alerts use.
PROCESS_METRICS = {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_start_time_seconds"}

KEYWORDS = {"and", "or", "unless", "by", "on", "offset"}


def documented(page: str = "monitoring.md") -> dict[str, tuple[str, set[str]]]:
    """Return the type and the labels of each metric in the table of a page in docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(camserve_\w+)` \| (\w+) \| (.*?) \|", text, re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def series(described: dict[str, tuple[str, set[str]]]) -> dict[str, set[str]]:
    """Return the names of the time series of these metrics, each with its labels."""
    return {
        f"{name}{suffix}": labels | ({"le"} if suffix == "_bucket" else set())
        for name, (kind, labels) in described.items()
        for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
    }


def matched_labels(query: str) -> dict[str, set[str]]:
    """Return the values that the matchers of a query name for each label; "A|B" has the values A and B."""
    values: dict[str, set[str]] = {}
    for label, value in re.findall(r'(\w+) *(?:=|!=|=~|!~) *"(.*?)"', query):
        values.setdefault(label, set()).update(value.split("|"))
    return values


def named_labels(query: str) -> set[str]:
    """Return the labels by which a query groups or joins."""
    return {label for names in re.findall(r"\b(?:by|on) \((.*?)\)", query) for label in names.split(", ")}


def metrics_in(query: str) -> list[str]:
    """Return all names in a query, in their order, that are not functions, labels or keywords."""
    rest = re.sub(r"\{.*?\}|\[.*?\]|\b(?:by|on) \(.*?\)", "", query)
    return [name for name in re.findall(r"\b[a-zA-Z_]\w*\b(?! *\()", rest) if name not in KEYWORDS]
