"""Small images that are part of a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from camserve import heatmaps, images

__all__ = ["SIDE_PX", "data_uri", "overlay", "small"]

# Length of the longer side. A page with a hundred images and twelve methods stays below 25 MB.
SIDE_PX = 192
_QUALITY = 80


def small(path: Path) -> PIL.Image.Image | None:
    """Return the upright RGB image, at most `SIDE_PX` wide and high, or None if the file cannot be read."""
    try:
        with PIL.Image.open(path) as file:
            file.draft("RGB", (2 * SIDE_PX, 2 * SIDE_PX))
            image = images.upright_rgb(file)
    except (OSError, ValueError, PIL.Image.DecompressionBombError):
        return None
    image.thumbnail((SIDE_PX, SIDE_PX), PIL.Image.Resampling.LANCZOS)
    return image


def overlay(image: PIL.Image.Image | None, saliency: NDArray[np.float32]) -> PIL.Image.Image:
    """Draw the map [h, w] over the small image, or alone if there is no image."""
    if image is None:
        height, width = saliency.shape
        scale = SIDE_PX / max(height, width)
        return heatmaps.heatmap(saliency, (max(1, round(width * scale)), max(1, round(height * scale))))
    return heatmaps.overlay(image, saliency, heatmaps.ALPHA)


def data_uri(image: PIL.Image.Image) -> str:
    """Return the image as a data URI, the source of an img element."""
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
