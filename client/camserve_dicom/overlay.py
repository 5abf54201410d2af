"""Drawing of the overlay: the image with the map in colour, and a legend below it."""

from __future__ import annotations

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from numpy.typing import NDArray

from camserve import heatmaps
from camserve_dicom.derivation import Derivation

__all__ = ["WARNING", "draw"]

WARNING = "RESEARCH USE ONLY - not for diagnosis"
# Minimum length of the longer side in pixels. A smaller image is enlarged by a whole factor, so that the legend is
# readable next to it.
_MIN_SIDE_PX = 400
# Font size relative to the longer side, because a viewer fits that side to the screen; and its limits in pixels.
_FONT_SHARE, _MIN_FONT_PX, _MAX_FONT_PX = 1 / 50, 14, 100
# Minimum width of the legend in multiples of the font size. The area to the right of a narrow image is black.
_LEGEND_WIDTH = 28
_WHITE, _GREY, _YELLOW = (255, 255, 255), (190, 190, 190), (255, 214, 10)


def draw(derivation: Derivation) -> tuple[NDArray[np.uint8], int]:
    """Draw the overlay.

    Args:
        derivation: The explanation and its image.

    Returns:
        The overlay as RGB uint8 [H, W, 3], and the factor by which the image is enlarged. The image is at the upper
        left, and its pixels are unchanged where the map is 0.
    """
    pixels = derivation.image.pixels
    scale = -(-_MIN_SIDE_PX // max(pixels.shape[:2]))
    image = PIL.Image.fromarray(pixels).convert("RGB")
    size = (image.width * scale, image.height * scale)
    image = image.resize(size, PIL.Image.Resampling.NEAREST)
    image = heatmaps.overlay(image, derivation.explanation.saliency, heatmaps.ALPHA)
    font = min(max(_MIN_FONT_PX, round(_FONT_SHARE * max(image.size))), _MAX_FONT_PX)
    legend = _legend(derivation, max(image.width, _LEGEND_WIDTH * font), font)
    canvas = PIL.Image.new("RGB", (legend.width, image.height + legend.height))
    canvas.paste(image)
    canvas.paste(legend, (0, image.height))
    return np.asarray(canvas), scale


def _legend(derivation: Derivation, width: int, size: int) -> PIL.Image.Image:
    """Draw the legend with this width and font size in pixels."""
    explanation = derivation.explanation
    font = PIL.ImageFont.load_default(size)
    margin, line = round(size * 0.7), round(size * 1.4)
    probability = f"probability {explanation.target.probability:.3f}"
    index = f" (class {explanation.target.index})" if explanation.target.label else ""
    lines = [
        (WARNING, _YELLOW),
        *((f"WARNING: {each}", _YELLOW) for each in derivation.image_warnings),
        (f"{_drawable(derivation.label)}{index}, {probability}", _WHITE),
        (f"{explanation.receipt.method} of {explanation.receipt.model}", _GREY),
        ("Colour shows what influenced the model, not where disease is.", _GREY),
    ]
    wrapped = [(part, colour) for text, colour in lines for part in _wrapped(text, font, width - 2 * margin)]
    legend = PIL.Image.new("RGB", (width, 2 * margin + line * (len(wrapped) + 1)))
    draw = PIL.ImageDraw.Draw(legend)
    for row, (text, colour) in enumerate(wrapped):
        draw.text((margin, margin + row * line), text, colour, font)
    top = margin + len(wrapped) * line
    draw.text((margin, top), "0", _WHITE, font)
    bar = margin + round(size * 1.1), min(width - 15 * size, 16 * size)
    colours = PIL.Image.fromarray(heatmaps.COLOURS[None]).resize((bar[1], size), PIL.Image.Resampling.BILINEAR)
    legend.paste(colours, (bar[0], top + round(size * 0.15)))
    draw.text((bar[0] + bar[1] + round(size * 0.5), top), "1, of this map's maximum", _WHITE, font)
    return legend


def _drawable(text: str) -> str:
    """Replace characters that the font lacks by question marks. The legend also shows the class index."""
    return "".join(each if each.isprintable() and ord(each) < 0x180 else "?" for each in text)


def _wrapped(text: str, font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont, width: int) -> list[str]:
    """Break text into lines of at most this width in pixels."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:  # a word may be longer than a line
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines
