"""The picture that people see: the map over the image, and below it a legend that says what it is."""

from __future__ import annotations

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from numpy.typing import NDArray

from camserve import heatmaps
from camserve_dicom.derivation import Derivation

__all__ = ["WARNING", "drawn"]

WARNING = "RESEARCH USE ONLY - not for diagnosis"
# The picture has at least as many pixels along its longer side, so that the legend can be read beside it: a smaller
# image is enlarged by whole pixels.
_LEAST_SIDE = 400
# The font's share of the longer side of the picture, which is what is fitted to a screen; and its size in pixels.
_FONT, _LEAST_FONT, _LARGEST_FONT = 1 / 50, 14, 100
# How wide the legend is at least, in sizes of the font. A tall picture gets black on its right.
_LEGEND = 28
_WHITE, _GREY, _YELLOW = (255, 255, 255), (190, 190, 190), (255, 214, 10)


def drawn(derivation: Derivation) -> tuple[NDArray[np.uint8], int]:
    """uint8 [H, W, 3], and how many times each pixel of the picture is wide in it.

    The picture is at the upper left, and untouched where the map is 0.
    """
    pixels = derivation.image.pixels
    scale = -(-_LEAST_SIDE // max(pixels.shape[:2]))
    image = PIL.Image.fromarray(pixels).convert("RGB")
    size = (image.width * scale, image.height * scale)
    image = image.resize(size, PIL.Image.Resampling.NEAREST)
    image = heatmaps.overlay(image, derivation.explanation.saliency, heatmaps.ALPHA)
    font = min(max(_LEAST_FONT, round(_FONT * max(image.size))), _LARGEST_FONT)
    legend = _legend(derivation, max(image.width, _LEGEND * font), font)
    canvas = PIL.Image.new("RGB", (legend.width, image.height + legend.height))
    canvas.paste(image)
    canvas.paste(legend, (0, image.height))
    return np.asarray(canvas), scale


def _legend(derivation: Derivation, width: int, size: int) -> PIL.Image.Image:
    explanation = derivation.explanation
    font = PIL.ImageFont.load_default(size)
    margin, line = round(size * 0.7), round(size * 1.4)
    percent = f"probability {explanation.target.probability:.3f}"
    index = f" (class {explanation.target.index})" if explanation.target.label else ""
    lines = [
        (WARNING, _YELLOW),
        (f"{_drawable(derivation.label)}{index}, {percent}", _WHITE),
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
    """What the font has no glyphs of would be boxes; the class's number stands beside it."""
    return "".join(each if each.isprintable() and ord(each) < 0x180 else "?" for each in text)


def _wrapped(text: str, font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for each in word:  # one of labels without spaces may be longer than a line
            if lines[-1] and font.getlength(lines[-1] + each) > width:
                lines.append("")
            lines[-1] += each
    return lines
