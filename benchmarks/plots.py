"""Bar charts as SVG files. The same values give the same bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.results import Chart

COLOURS = ("#9aa5b1", "#c8553d", "#2f6690", "#81a4cd", "#5b8e7d", "#d9a441", "#7a5c8e", "#333333")


def draw(chart: Chart, path: Path) -> None:
    """Draw a chart with one labelled bar for each value and write it to a file."""
    names = list(dict.fromkeys(name for group in chart.groups.values() for name in group))
    with mpl.rc_context({"svg.hashsalt": "camserve", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 0.5 + 0.32 * sum(len(group) + 1 for group in chart.groups.values())))
        axes = figure.add_subplot()
        at, ticks = 0.0, []
        for group, values in chart.groups.items():
            first = at
            for name, value in values.items():
                axes.barh(at, value, height=0.85, color=COLOURS[names.index(name) % len(COLOURS)])
                axes.annotate(
                    f"{value:,.0f}  {name}" if value >= 100 else f"{value:.3g}  {name}",
                    (value, at),
                    xytext=(4, 0),
                    textcoords="offset points",
                    verticalalignment="center",
                )
                at += 1
            ticks.append(((first + at - 1) / 2, group))
            at += 0.8
        axes.set_yticks([y for y, _ in ticks], [group for _, group in ticks])
        axes.invert_yaxis()
        if chart.logarithmic:
            axes.set_xscale("log")
        axes.set_xlabel(f"{chart.unit}{', logarithmic' if chart.logarithmic else ''}")
        axes.set_title(chart.title, loc="left")
        axes.margins(x=0.35 if not chart.logarithmic else 0.5)
        axes.set_xlim(left=None if chart.logarithmic else 0)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
