"""From a picture to the model's input."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from torch import Tensor

from camserve_server.errors import InvalidArgument, TooLarge

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class Preprocessing:
    """The whole image is resized to `size` (H, W), its proportions given up, and normalised by `mean` and `std`.

    These have a number for each channel: three for colours, one for a model of grey-scale pictures.
    Nothing is cropped, so the map covers the image that the caller sent, as in the Poly-CAM paper.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation

    def __str__(self) -> str:
        height, width = self.size
        return f"squash {height}x{width} {self.interpolation}, mean {list(self.mean)}, std {list(self.std)}"

    @property
    def channels(self) -> int:
        """C of the model's input: 1 or 3."""
        return len(self.mean)

    def __call__(self, picture: PIL.Image.Image) -> Tensor:
        """An RGB picture → [C, H, W] float32, normalised. Colours become grey by ITU-R BT.601's luma."""
        height, width = self.size
        resample = PIL.Image.Resampling[self.interpolation.upper()]
        picture = picture.convert("L") if self.channels == 1 else picture
        values = np.asarray(picture.resize((width, height), resample), dtype=np.float32)
        pixels = np.atleast_3d(values).transpose(2, 0, 1) / 255
        mean, std = (self.column(values).numpy() for values in (self.mean, self.std))
        # In NumPy, because this runs beside the engine's thread: see device/.
        return torch.from_numpy(np.ascontiguousarray((pixels - mean) / std, dtype=np.float32))

    @staticmethod
    def column(values: tuple[float, ...]) -> Tensor:
        """[C, 1, 1] float64, to meet an image."""
        return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)


def decode(data: bytes, *, max_pixels: int, field: str) -> PIL.Image.Image:
    """An encoded picture → RGB, upright (EXIF orientation applied), alpha dropped.

    The size is checked before a pixel is decoded. Raises InvalidArgument if it cannot be read, TooLarge.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own guard against bombs; ours is the next line but one
            picture: PIL.Image.Image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        check_size(picture.width, picture.height, max_pixels, field)
        picture = PIL.ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):  # convert() would clip, not scale
            picture = PIL.Image.fromarray((np.asarray(picture, dtype=np.uint16) >> 8).astype(np.uint8))
        return picture.convert("RGB")
    except TooLarge:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they like on hostile bytes
        raise InvalidArgument(
            f"the image cannot be read ({type(error).__name__}); expected one of {', '.join(FORMATS)}",
            field=field,
            reason="UNREADABLE_IMAGE",
        ) from error


def check_size(width: int, height: int, max_pixels: int, field: str) -> None:
    """Raises InvalidArgument for an empty picture, TooLarge for one of more than `max_pixels`."""
    if width < 1 or height < 1:
        raise InvalidArgument(f"an image of {width}x{height} pixels has none", field=field)
    if width * height > max_pixels:
        raise TooLarge(
            f"an image of {width}x{height} pixels is larger than this server takes ({max_pixels} pixels); "
            "send a smaller one",
            field=field,
        )


def from_pixels(pixels: NDArray[np.uint8]) -> PIL.Image.Image:
    """[H, W, 3] uint8 → RGB picture."""
    return PIL.Image.fromarray(pixels)
