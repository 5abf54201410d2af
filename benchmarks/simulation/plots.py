"""Line charts as SVG files. The same values give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.plots import COLOURS


@dataclass(frozen=True)
class Lines:
    """Line chart: name of the series → points (x, y)."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    logarithmic: bool = False


def draw(chart: Lines, path: Path) -> None:
    """Draw a chart and write it to a file."""
    with mpl.rc_context({"svg.hashsalt": "camserve", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 4))
        axes = figure.add_subplot()
        for colour, (name, points) in zip(COLOURS * len(chart.series), chart.series.items(), strict=False):
            finite = [(x, y) for x, y in points if math.isfinite(y)]
            marker = "o" if len(points) < 12 else None
            axes.plot([x for x, _ in finite], [y for _, y in finite], marker=marker, label=name, color=colour)
        if chart.logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(chart.x)
        axes.set_ylabel(chart.y)
        axes.set_title(chart.title, loc="left")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
