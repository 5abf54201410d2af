"""Checks of the pixels that the model gets: constant and saturated images have no meaningful map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["is_constant", "saturation_warnings"]

# A larger share of black and white pixels gives a warning.
_MAX_SATURATED = 0.99


def is_constant(pixels: NDArray[np.uint8]) -> bool:
    """Return True if all pixels have the same grey level or colour.

    Args:
        pixels: uint8 [H, W] or [H, W, 3].
    """
    return bool((pixels == pixels[0, 0]).all())


def saturation_warnings(pixels: NDArray[np.uint8]) -> tuple[str, ...]:
    """Return a warning about an image of which more than 99 % is black or white, or nothing.

    Args:
        pixels: uint8 [H, W], or [H, W, 3], where a pixel counts if each channel is 0 or 255.
    """
    extreme = (pixels == 0) | (pixels == 255)
    share = float((extreme if extreme.ndim == 2 else extreme.all(axis=2)).mean())
    if share <= _MAX_SATURATED:
        return ()
    # Rounded down, so that it is 100 only if no other pixel exists.
    return (f"saturated image: {int(1000 * share) / 10:g}% of its pixels are black or white; check its window",)
