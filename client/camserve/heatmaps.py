"""Saliency as colour: heat maps, and overlays on the image.

The colours go from night blue over violet, pink and orange to pale yellow. Their lightness rises steadily, so the order
can be read by people who see colours differently, and on a grey print.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import PIL.Image
from numpy.typing import NDArray

__all__ = ["ALPHA", "COLOURS", "heatmap", "overlay"]

# How much the colour covers where the map is 1: enough to be seen on a bright photograph, and to see it underneath.
ALPHA = 0.7

# Evenly spaced from 0 to 1; between them the colours are interpolated.
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


def _interpolated(anchors: list[tuple[int, int, int]]) -> NDArray[np.uint8]:
    at, steps = np.linspace(0, 1, len(anchors)), np.linspace(0, 1, 256)
    return np.stack(
        [np.rint(np.interp(steps, at, channel)).astype(np.uint8) for channel in zip(*anchors, strict=True)], 1
    )


# uint8 [256, 3]
COLOURS = _interpolated(_ANCHORS)


def _resized(saliency: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """[h, w] in [0, 1] → [H, W] of `size` (width, height). The map covers the whole image, as the model saw it."""
    smooth = PIL.Image.fromarray(saliency).resize(size, PIL.Image.Resampling.BILINEAR)
    return np.asarray(smooth, dtype=np.float32).clip(0, 1)


def _coloured(levels: NDArray[np.float32]) -> PIL.Image.Image:
    indexed = PIL.Image.fromarray(np.rint(255 * levels).astype(np.uint8))
    indexed.putpalette(list(chain.from_iterable(COLOURS.tolist())))
    return indexed.convert("RGB")


def heatmap(saliency: NDArray[np.float32], size: tuple[int, int]) -> PIL.Image.Image:
    """Saliency [h, w] in [0, 1] → RGB image of `size` (width, height)."""
    return _coloured(_resized(saliency, size))


def overlay(image: PIL.Image.Image, saliency: NDArray[np.float32], alpha: float) -> PIL.Image.Image:
    """RGB image under saliency [h, w] in [0, 1] → RGB image of the same size.

    A pixel is covered with the root of its saliency times `alpha`: where the map is 0 the image is left as it is, where
    it is 1 the colour covers `alpha` of it, and weak regions can still be seen.
    """
    smooth = _resized(saliency, image.size)
    opacity = PIL.Image.fromarray(np.rint(255 * alpha * np.sqrt(smooth)).astype(np.uint8))
    return PIL.Image.composite(_coloured(smooth), image, opacity)
