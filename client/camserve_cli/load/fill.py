"""How full the server's batches were, by what it tells Prometheus."""

from __future__ import annotations

import re
import urllib.request

from camserve.errors import InvalidArgument

__all__ = ["Counted", "counted", "fill", "read"]

# Rows that were run, and rows of padding.
Counted = tuple[float, float]

_COUNTERS = ("camserve_rows_total", "camserve_padding_rows_total")
_TIMEOUT_S = 10.0


def read(url: str) -> Counted:
    """What the server at the URL has counted by now. Raises OSError, and InvalidArgument for a page of another kind."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            return counted(answer.read().decode())
    except ValueError as error:
        raise InvalidArgument(f"{url} has no metrics of a camserve server: {error}", field="metrics_url") from error


def counted(text: str) -> Counted:
    """Of all lanes, from Prometheus' text format; 0 before the first batch. Raises ValueError without the counters."""
    found = []
    for name in _COUNTERS:
        if not re.search(rf"^# TYPE {name.removesuffix('_total')}(_total)? counter$", text, re.MULTILINE):
            raise ValueError(f"there is no {name}")
        found.append(sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)", text, re.MULTILINE))))
    return found[0], found[1]


def fill(before: Counted, after: Counted) -> float | None:
    """The share of the batches in between that was rows, and no padding; None where there were none."""
    rows, padding = after[0] - before[0], after[1] - before[1]
    return rows / (rows + padding) if rows + padding > 0 else None
