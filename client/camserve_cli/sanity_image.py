"""Image of a randomisation check: the map of each step, and its similarity to the map of the trained network.

The upper part follows Figure 26 of the Poly-CAM paper (arXiv:2204.13359), and the lower part follows Figure A6 of the
Opti-CAM paper (arXiv:2301.07002).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from camserve import heatmaps
from camserve.answers import Randomised, SaliencyMap

__all__ = ["draw", "write_text"]

TILE, GAP, TEXT, CURVES = 160, 8, 13, 150
INK, SOFT, LINE, PAPER = (25, 25, 35), (105, 105, 120), (215, 215, 222), (255, 255, 255)
# The series differ in their marks as well as in their colours.
SERIES = {
    "spearman": ("rank correlation", (60, 50, 180), "circle"),
    "ssim": ("structural similarity", (200, 50, 120), "square"),
    "hog": ("oriented gradients", (190, 100, 0), "triangle"),
}
Point = tuple[float, float]


def draw(result: SaliencyMap, steps: Sequence[Randomised], title: str) -> PIL.Image.Image:
    """Draw the check.

    Args:
        result: The map of the trained network.
        steps: The map of each step, with its similarities.
        title: Title of the image.

    Returns:
        An RGB image. Its columns show the explained image, the map of the trained network, and the map of each step.
    """
    image = result.image()
    image.thumbnail((TILE, TILE))
    labels = ["", "trained", *(step.layers[-1] for step in steps)]
    tiles = [image, *(_over(image, S) for S in (result.saliency, *(step.saliency for step in steps)))]
    top = 2 * TEXT + 2 * GAP
    below = top + image.height + 2 * TEXT
    width, height = GAP + len(tiles) * (TILE + GAP), below + CURVES + 4 * TEXT
    page = PIL.Image.new("RGB", (max(width, 6 * (TILE + GAP)), height), PAPER)
    pen = PIL.ImageDraw.Draw(page)
    write_text(pen, (GAP, GAP), title, INK, size=TEXT + 2)
    at = [GAP + i * (TILE + GAP) for i in range(len(tiles))]
    for left, tile, label in zip(at, tiles, labels, strict=True):
        page.paste(tile, (left, top))
        write_text(pen, (left, top + image.height + 3), label, SOFT, most=TILE)
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
        write_text(pen, (GAP + 16, y - TEXT / 2 - 2), meaning, INK, most=TILE - 16)
    return page


def _over(image: PIL.Image.Image, saliency: object) -> PIL.Image.Image:
    return heatmaps.overlay(image, np.asarray(saliency, np.float32), heatmaps.ALPHA)


def _y(value: float, top: float) -> float:
    return top + CURVES * (1 - max(-1.0, min(1.0, value))) / 2


def _axes(pen: PIL.ImageDraw.ImageDraw, centres: Sequence[float], top: float) -> None:
    for value in (-1, 0, 1):
        y = _y(value, top)
        pen.line([(centres[0] - TILE / 4, y), (centres[-1] + TILE / 2, y)], fill=LINE)
        write_text(pen, (centres[0] - TILE / 4 - 18, y - TEXT / 2 - 2), f"{value}", SOFT)


def _mark(pen: PIL.ImageDraw.ImageDraw, at: Point, colour: tuple[int, int, int], mark: str) -> None:
    x, y = at
    match mark:
        case "circle":
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        case "square":
            pen.rectangle((x - 4, y - 4, x + 4, y + 4), fill=colour)
        case _:
            pen.polygon([(x, y - 5), (x - 5, y + 4), (x + 5, y + 4)], fill=colour)


def write_text(
    pen: PIL.ImageDraw.ImageDraw,
    at: Point,
    text: str,
    colour: tuple[int, int, int],
    *,
    size: int = TEXT,
    most: int | None = None,
) -> None:
    """Write a text. If it is wider than `most` pixels, cut its beginning: names of layers differ at their ends."""
    font = PIL.ImageFont.load_default(size)
    cut = text
    while most is not None and cut and pen.textlength(cut if cut == text else "…" + cut, font=font) > most:
        cut = cut[1:]
    pen.text(at, text if cut == text else "…" + cut, fill=colour, font=font)
