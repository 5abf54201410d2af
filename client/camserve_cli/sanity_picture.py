"""The picture of a randomisation check: the maps from step to step, and how like the first they are.

Like Figure 26 of the Poly-CAM paper (arXiv:2204.13359) above, and Figure A6 of the Opti-CAM paper (arXiv:2301.07002)
below.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from camserve import heatmaps
from camserve.answers import Randomised, SaliencyMap

__all__ = ["draw"]

TILE, GAP, TEXT, CURVES = 160, 8, 13, 150
INK, SOFT, LINE, PAPER = (25, 25, 35), (105, 105, 120), (215, 215, 222), (255, 255, 255)
# Told apart by their marks as well as by their colours.
SERIES = {
    "spearman": ("rank correlation", (60, 50, 180), "circle"),
    "ssim": ("structural similarity", (200, 50, 120), "square"),
    "hog": ("oriented gradients", (190, 100, 0), "triangle"),
}
Point = tuple[float, float]


def draw(shown: SaliencyMap, steps: Sequence[Randomised], title: str) -> PIL.Image.Image:
    """RGB; columns are the image, its map by the network itself, and the map of each step."""
    image = shown.image()
    image.thumbnail((TILE, TILE))
    labels = ["", "trained", *(step.layers[-1] for step in steps)]
    tiles = [image, *(_over(image, S) for S in (shown.saliency, *(step.saliency for step in steps)))]
    top = 2 * TEXT + 2 * GAP
    below = top + image.height + 2 * TEXT
    width, height = GAP + len(tiles) * (TILE + GAP), below + CURVES + 4 * TEXT
    page = PIL.Image.new("RGB", (max(width, 6 * (TILE + GAP)), height), PAPER)
    pen = PIL.ImageDraw.Draw(page)
    _text(pen, (GAP, GAP), title, INK, size=TEXT + 2)
    at = [GAP + i * (TILE + GAP) for i in range(len(tiles))]
    for left, tile, label in zip(at, tiles, labels, strict=True):
        page.paste(tile, (left, top))
        _text(pen, (left, top + image.height + 3), label, SOFT, most=TILE)
    centres = [left + TILE / 2 for left in at[1:]]
    _axes(pen, centres, below)
    for row, (name, (meaning, colour, mark)) in enumerate(SERIES.items()):
        values = [1.0, *(getattr(step, name) for step in steps)]
        points = [(x, _y(value, below)) for x, value in zip(centres, values, strict=True)]
        pen.line(points, fill=colour, width=2)
        for point in points:
            _mark(pen, point, colour, mark)
        y = below + 20 + row * 2 * TEXT
        _mark(pen, (GAP + 6, y), colour, mark)
        _text(pen, (GAP + 16, y - TEXT / 2 - 2), meaning, INK, most=TILE - 16)
    return page


def _over(image: PIL.Image.Image, saliency: object) -> PIL.Image.Image:
    return heatmaps.overlay(image, np.asarray(saliency, np.float32), heatmaps.ALPHA)


def _y(value: float, top: float) -> float:
    return top + CURVES * (1 - max(-1.0, min(1.0, value))) / 2


def _axes(pen: PIL.ImageDraw.ImageDraw, centres: Sequence[float], top: float) -> None:
    for value in (-1, 0, 1):
        y = _y(value, top)
        pen.line([(centres[0] - TILE / 4, y), (centres[-1] + TILE / 2, y)], fill=LINE)
        _text(pen, (centres[0] - TILE / 4 - 18, y - TEXT / 2 - 2), f"{value}", SOFT)


def _mark(pen: PIL.ImageDraw.ImageDraw, at: Point, colour: tuple[int, int, int], mark: str) -> None:
    x, y = at
    match mark:
        case "circle":
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        case "square":
            pen.rectangle((x - 4, y - 4, x + 4, y + 4), fill=colour)
        case _:
            pen.polygon([(x, y - 5), (x - 5, y + 4), (x + 5, y + 4)], fill=colour)


def _text(
    pen: PIL.ImageDraw.ImageDraw,
    at: Point,
    text: str,
    colour: tuple[int, int, int],
    *,
    size: int = TEXT,
    most: int | None = None,
) -> None:
    """What does not fit into `most` pixels loses its beginning: layers differ at their ends."""
    font = PIL.ImageFont.load_default(size)
    cut = text
    while most is not None and cut and pen.textlength(cut if cut == text else "…" + cut, font=font) > most:
        cut = cut[1:]
    pen.text(at, text if cut == text else "…" + cut, fill=colour, font=font)
