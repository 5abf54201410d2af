"""Small pictures that become part of the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from camserve import heatmaps

__all__ = ["SIDE_PX", "data_uri", "overlay", "small"]

# Of the longer side: a hundred images by twelve methods stay below 25 MB.
SIDE_PX = 192
_QUALITY = 80


def small(path: Path) -> PIL.Image.Image | None:
    """The image, upright, RGB, at most `SIDE_PX` wide and high; None where it cannot be read any more."""
    try:
        with PIL.Image.open(path) as file:
            file.draft("RGB", (2 * SIDE_PX, 2 * SIDE_PX))
            image = PIL.ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, PIL.Image.DecompressionBombError):
        return None
    image.thumbnail((SIDE_PX, SIDE_PX), PIL.Image.Resampling.LANCZOS)
    return image


def overlay(image: PIL.Image.Image | None, saliency: NDArray[np.float32]) -> PIL.Image.Image:
    """The map [h, w] over the small image; alone where there is none."""
    if image is None:
        height, width = saliency.shape
        scale = SIDE_PX / max(height, width)
        return heatmaps.heatmap(saliency, (max(1, round(width * scale)), max(1, round(height * scale))))
    return heatmaps.overlay(image, saliency, heatmaps.ALPHA)


def data_uri(image: PIL.Image.Image) -> str:
    """The picture as the source of an img element."""
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
