"""An image that a user has opened in the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import PIL.Image

__all__ = ["LoadedImage", "base64_text", "preview"]

# Longest side of a preview in pixels: enough for the widest column of the page on a screen with two pixels per CSS
# pixel.
_PREVIEW_SIDE_PX = 1024


@dataclass(frozen=True)
class LoadedImage:
    """An image that can be explained.

    Attributes:
        width: Width of the upright image in pixels.
        height: Height of the upright image in pixels.
        preview: The image as a JPEG file of at most 1024 pixels per side, in base64.
        pixels: The pixels of a DICOM image as a PNG file, in base64, which the page sends instead of the file. Empty
            for other files, which the page sends as they are.
        dicom: True for a DICOM image.
        frame: Number of the frame that is shown, counted from 0.
        frames: Number of frames.
        notes: Steps from the stored values of a DICOM image to its pixels.
        warnings: Warnings about the pixels.
    """

    width: int
    height: int
    preview: str
    pixels: str = ""
    dicom: bool = False
    frame: int = 0
    frames: int = 1
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def preview(picture: PIL.Image.Image) -> str:
    """Return a reduced image as a JPEG file in base64.

    Args:
        picture: RGB or grey-scale image.
    """
    small = picture.copy()
    small.thumbnail((_PREVIEW_SIDE_PX, _PREVIEW_SIDE_PX))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=90)
    return base64_text(file.getvalue())


def base64_text(data: bytes) -> str:
    """Return bytes in base64."""
    return base64.b64encode(data).decode()
