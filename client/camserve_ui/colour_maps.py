"""Colour maps of the page. The browser applies them, so that a change needs no request."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from camserve.heatmaps import COLOURS

__all__ = ["COLOUR_MAPS"]


def _between(*anchors: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return 256 colours that interpolate RGB colours at equal distances."""
    at, steps = np.linspace(0, 1, len(anchors)), np.linspace(0, 1, 256)
    return np.stack([np.interp(steps, at, channel) for channel in np.transpose(anchors)], 1).round().astype(np.uint8)


# Colours uint8 [256, 3] by name, from the colour of 0 to the colour of 1. The first is the default, and is that of
# `camserve explain`. Except for red, the lightness of all of them increases monotonically.
COLOUR_MAPS: dict[str, NDArray[np.uint8]] = {
    "Default": COLOURS,
    "Viridis": _between(
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ),
    "Grey": _between((0, 0, 0), (255, 255, 255)),
    "Red": _between((255, 0, 0), (255, 0, 0)),  # only the opacity shows the value
}
