"""Charts as SVG elements that are part of the page and use its colours. The same numbers give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

__all__ = ["MAX_LINES", "Curve", "Line", "Point", "curves", "layers", "lines", "scatter"]

Numbers = NDArray[np.float64]

# `_inline` replaces this colour by the text colour of the page, which depends on the light or dark colour scheme.
_INK = "#010203"
# Each colour is visible on white and on black. The dashes distinguish the lines in grey print. The first colour is that
# of the method with which the others are compared.
_COLOURS = (_INK, "#9c4fd6", "#d0661b", "#178a7c", "#3b7fd9", "#d23f86", "#8a8420")
_DASHES: tuple[tuple[int, tuple[float, ...]], ...] = (
    (0, ()),
    (0, ()),
    (0, (5, 1.5)),
    (0, (1.5, 1.5)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (3, 1)),
    (0, (8, 2)),
)
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a $ in a name is not a formula
    "svg.fonttype": "none",  # keep text as text elements
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}
MAX_LINES = len(_COLOURS)
# In inches of 72 units. The font size is 10 units.
_WIDTH = 4.6
# More points than pixels would increase the size of the page without a visible difference.
_MOST_POINTS = 128


@dataclass(frozen=True)
class Curve:
    """Mean curve over images with its confidence band.

    Attributes:
        label: Text in the legend.
        mean: Mean at each of P points, [P].
        low: Lower end of the confidence interval, [P].
        high: Upper end of the confidence interval, [P].
    """

    label: str
    mean: Numbers
    low: Numbers
    high: Numbers


@dataclass(frozen=True)
class Point:
    """Mean with its confidence interval.

    Attributes:
        label: Text beside the point or below it.
        x: Position on the x axis.
        mean: The mean.
        low: Lower end of the confidence interval.
        high: Upper end of the confidence interval.
        hollow: Draw a hollow point, which marks a control.
    """

    label: str
    x: float
    mean: float
    low: float
    high: float
    hollow: bool = False


@dataclass(frozen=True)
class Line:
    """Line through points. Points whose y is NaN are left out.

    Attributes:
        label: Text in the legend.
        x: Positions on the x axis, [P].
        y: Positions on the y axis, [P].
        level: Draw a horizontal line at the first y instead.
    """

    label: str
    x: Numbers
    y: Numbers
    level: bool = False


def curves(alt: str, drawn: Sequence[Curve], x: Numbers, x_label: str, y_label: str) -> str:
    """Draw curves with their confidence bands.

    Args:
        alt: Description of the chart for screen readers. It must be unique within the page.
        drawn: At most `MAX_LINES` curves. The first is that of the method with which the others are compared.
        x: Positions on the x axis, [P].
        x_label: Label of the x axis.
        y_label: Label of the y axis.

    Returns:
        An SVG element.
    """

    def draw(axes: Axes) -> None:
        every = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).round().astype(int))
        marker = "o" if len(x) < 20 else ""
        for curve, colour, dashes in zip(drawn, _COLOURS, _DASHES, strict=False):
            axes.fill_between(x[every], curve.low[every], curve.high[every], color=colour, alpha=0.13, linewidth=0)
            axes.plot(
                x[every], curve.mean[every], color=colour, linestyle=dashes, label=curve.label, lw=1.7, marker=marker,
                markersize=3.5,
            )  # fmt: skip
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_xlim(min(0, x.min()), x.max())
        axes.grid(visible=True)
        axes.figure.legend(loc="outside lower left", ncols=2, handlelength=2.6)

    return _svg(alt, 3.5, draw)


def lines(
    alt: str,
    drawn: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Mapping[str, float] | None = None,
) -> str:
    """Draw lines.

    Args:
        alt: Description of the chart for screen readers. It must be unique within the page.
        drawn: At most `MAX_LINES` lines.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        log_x: Use a logarithmic x axis.
        log_y: Use a logarithmic y axis.
        x_ticks: Positions of the ticks on the x axis, by text.

    Returns:
        An SVG element.
    """

    def draw(axes: Axes) -> None:
        for line, colour, dashes in zip(drawn, _COLOURS, _DASHES, strict=False):
            if line.level:
                axes.axhline(line.y[0], color=colour, linestyle=(0, (2, 2)), lw=1, label=line.label)
                continue
            finite = np.isfinite(line.y)
            x, y = line.x[finite], line.y[finite]
            marker = "o" if len(x) < 30 else ""
            axes.plot(x, y, color=colour, linestyle=dashes, label=line.label, lw=1.5, marker=marker, ms=3)
        for axis, logarithmic in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
            if logarithmic:
                # The default locator draws no tick if the axis spans less than a decade.
                getattr(axes, f"set_{axis.axis_name}scale")("log", subs=())
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        if not log_y:
            axes.set_ylim(bottom=0)
        if x_ticks:
            axes.set_xticks([*x_ticks.values()], [*x_ticks])
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(visible=True)
        axes.figure.legend(loc="outside lower left", ncols=3, handlelength=2.6)

    return _svg(alt, 3.3, draw)


def scatter(alt: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Draw points with their confidence intervals and their names.

    Args:
        alt: Description of the chart for screen readers. It must be unique within the page.
        points: The points.
        x_label: Label of the x axis.
        y_label: Label of the y axis.

    Returns:
        An SVG element.
    """

    def draw(axes: Axes) -> None:
        for point in points:
            axes.plot([point.x, point.x], [point.low, point.high], color=_COLOURS[1], lw=1, alpha=0.5)
            face = "none" if point.hollow else _COLOURS[1]
            axes.plot(point.x, point.mean, "o", color=_COLOURS[1], markerfacecolor=face, markersize=5)
        if max(point.x for point in points) > 10 * min(point.x for point in points):
            axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}")
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(visible=True)
        axes.margins(x=0.08, y=0.12)
        _draw_names(axes, points)

    return _svg(alt, 3.2, draw)


def layers(alt: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Draw a line through points with a tick for each point.

    Args:
        alt: Description of the chart for screen readers. It must be unique within the page.
        points: The points, whose labels are the texts of the ticks.
        x_label: Label of the x axis.
        y_label: Label of the y axis.

    Returns:
        An SVG element.
    """

    def draw(axes: Axes) -> None:
        x = [point.x for point in points]
        axes.fill_between(x, [p.low for p in points], [p.high for p in points], color=_COLOURS[1], alpha=0.15, lw=0)
        axes.plot(x, [point.mean for point in points], "o-", color=_COLOURS[1], lw=1.7, markersize=4.5)
        axes.set_xticks(x, [point.label for point in points])
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(visible=True, axis="y")
        axes.margins(x=0.08)

    return _svg(alt, 3.0, draw)


def _draw_names(axes: Axes, points: Sequence[Point]) -> None:
    """Write the names in a column to the right without overlap, and connect each with its point by a line."""
    low, high = axes.get_ylim()
    gap = (high - low) / max(13, len(points))
    ordered = sorted(points, key=lambda point: point.mean)
    at: list[float] = []
    for point in ordered:
        at.append(max(point.mean, at[-1] + gap) if at else point.mean)
    # Move down the names that are above the upper end of the axis.
    ceiling = high
    for i in reversed(range(len(at))):
        at[i] = min(at[i], ceiling)
        ceiling = at[i] - gap
    for point, y in zip(ordered, at, strict=True):
        axes.annotate(
            point.label,
            xy=(point.x, point.mean),
            xytext=(1.03, y),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            arrowprops={
                "arrowstyle": "-",
                "color": _INK,
                "alpha": 0.3,
                "linewidth": 0.6,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


# ---- from matplotlib into the page ----------------------------------------------------------------------------------


def _svg(alt: str, height: float, draw: Callable[[Axes], None]) -> str:
    """Draw a chart and return it as an SVG element.

    `alt` is also the salt of the ids in the element, which must differ from the ids of other charts in the page.
    """
    with mpl.rc_context({**_STYLE, "svg.hashsalt": alt}):
        figure = Figure((_WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return _inline(file.getvalue(), alt)


def _inline(svg: str, alt: str) -> str:
    """Convert an SVG file to an element of a page. Screen readers treat it as one image."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[\d.]+pt" height="[\d.]+pt"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1).replace("xlink:href", "href")
