"""Colouring of saliency maps: heat maps, and overlays on the image.

The colour scale runs from dark blue over violet, pink and orange to pale yellow. Its lightness increases monotonically,
so readers with colour vision deficiency and readers of a grey-scale print can also compare values.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import PIL.Image
from numpy.typing import NDArray

__all__ = ["ALPHA", "COLOURS", "heatmap", "overlay"]

# Opacity where the map is 1: the colour is visible on a bright photograph, and the photograph under the colour.
ALPHA = 0.7

# RGB colours at equal distances from 0 to 1. Colours between them are interpolated.
_ANCHORS = [
    (6, 6, 40),
    (20, 30, 110),
    (60, 50, 180),
    (130, 50, 200),
    (200, 50, 170),
    (240, 80, 110),
    (255, 130, 60),
    (255, 190, 60),
    (255, 250, 170),
]


def _interpolate(anchors: list[tuple[int, int, int]]) -> NDArray[np.uint8]:
    at, steps = np.linspace(0, 1, len(anchors)), np.linspace(0, 1, 256)
    return np.stack(
        [np.rint(np.interp(steps, at, channel)).astype(np.uint8) for channel in zip(*anchors, strict=True)], 1
    )


# The colour scale, uint8 [256, 3], from the colour of 0 to the colour of 1.
COLOURS = _interpolate(_ANCHORS)


def _resize(saliency: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return the map resized from [h, w] to [H, W], where `size` is (W, H) in pixels. Values stay in [0, 1]."""
    resized = PIL.Image.fromarray(saliency).resize(size, PIL.Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32).clip(0, 1)


def _colour(values: NDArray[np.float32]) -> PIL.Image.Image:
    indexed = PIL.Image.fromarray(np.rint(255 * values).astype(np.uint8))
    indexed.putpalette(list(chain.from_iterable(COLOURS.tolist())))
    return indexed.convert("RGB")


def heatmap(saliency: NDArray[np.float32], size: tuple[int, int]) -> PIL.Image.Image:
    """Return a saliency map as an RGB image.

    Args:
        saliency: Saliency map, float32 [h, w] in [0, 1].
        size: (width, height) of the result in pixels. The map is resized to it.

    Returns:
        The coloured map.
    """
    return _colour(_resize(saliency, size))


def overlay(image: PIL.Image.Image, saliency: NDArray[np.float32], alpha: float) -> PIL.Image.Image:
    """Return an image with a coloured saliency map on top.

    The opacity of a pixel is `alpha` times the square root of its saliency. Pixels with saliency 0 do not change, and
    regions of low saliency are still visible.

    Args:
        image: RGB image.
        saliency: Saliency map, float32 [h, w] in [0, 1]. It covers the whole image.
        alpha: Opacity where the map is 1, in [0, 1].

    Returns:
        RGB image of the same size as `image`.
    """
    resized = _resize(saliency, image.size)
    opacity = PIL.Image.fromarray(np.rint(255 * alpha * np.sqrt(resized)).astype(np.uint8))
    return PIL.Image.composite(_colour(resized), image, opacity)
