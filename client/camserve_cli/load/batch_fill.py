"""Share of real rows in the batches of a server, read from its Prometheus metrics."""

from __future__ import annotations

import re
import urllib.request

from camserve.errors import InvalidArgument

__all__ = ["RowCounts", "fill_share", "parse_counters", "read_counters"]

# Real rows and padding rows since the start of the server.
RowCounts = tuple[float, float]

_COUNTERS = ("camserve_rows_total", "camserve_padding_rows_total")
_TIMEOUT_S = 10.0


def read_counters(url: str) -> RowCounts:
    """Read the row counters from the metrics page of a server.

    Args:
        url: Address of the metrics page, for example "http://127.0.0.1:9090/metrics".

    Returns:
        The numbers of real rows and of padding rows.

    Raises:
        OSError: The page cannot be read.
        InvalidArgument: The page has no row counters of a camserve server.
    """
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            return parse_counters(answer.read().decode())
    except ValueError as error:
        raise InvalidArgument(
            f"{url} has no metrics of a camserve server: {error}; give the URL of the server's metrics_listen",
            field="metrics_url",
        ) from error


def parse_counters(text: str) -> RowCounts:
    """Add up the row counters of all kinds of lane.

    Args:
        text: A page in Prometheus' text format.

    Returns:
        The numbers of real rows and of padding rows. Both are 0 before the first batch.

    Raises:
        ValueError: The page does not declare the counters.
    """
    totals = []
    for name in _COUNTERS:
        if not re.search(rf"^# TYPE {name.removesuffix('_total')}(_total)? counter$", text, re.MULTILINE):
            raise ValueError(f"the counter {name} is missing")
        totals.append(sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)", text, re.MULTILINE))))
    return totals[0], totals[1]


def fill_share(before: RowCounts, after: RowCounts) -> float | None:
    """Return the share of real rows in the batches between two readings, or None if there were no batches."""
    rows, padding = after[0] - before[0], after[1] - before[1]
    return rows / (rows + padding) if rows + padding > 0 else None
