"""From a picture to the model's input."""

from __future__ import annotations

import io
import re
import struct
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

# A side as long as JPEG allows. Filters that shrink a longer one take memory by its length, whatever the other is.
MAX_SIDE = 65_535
MAX_SCANS = 100  # of a JPEG: progressive ones have about ten, and each costs a pass over all pixels
MAX_MARKERS = 10_000
MAX_NUMBERS = 200_000  # in the tags of a TIFF: two for each of its strips or tiles


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
    # Pillow's own bound, which also holds for tiles and frames, must not be lower than the configured one.
    PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        if data.startswith(b"\xff\xd8"):
            _check_markers(data, field)
        if data.startswith((b"II", b"MM")):
            _check_tags(data, field)
        picture: PIL.Image.Image = PIL.Image.open(_File(data, field), formats=FORMATS)
        check_size(picture.width, picture.height, max_pixels, field)
        PIL.ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode.startswith("I;16"):  # convert() would clip, not scale
            picture = PIL.Image.fromarray((np.asarray(picture, dtype=np.uint16) >> 8).astype(np.uint8))
        return picture.convert("RGB")
    except TooLarge:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise TooLarge(f"the image is larger than this server takes ({max_pixels} pixels)", field=field) from error
    except Exception as error:  # Pillow's decoders raise whatever they like on hostile bytes
        raise InvalidArgument(
            f"the image cannot be read ({type(error).__name__}); expected one of {', '.join(FORMATS)}",
            field=field,
            reason="UNREADABLE_IMAGE",
        ) from error


class _File(io.BytesIO):
    """Of the encoded picture. Headers of millions of tiny parts are read one by one, in minutes and gigabytes."""

    def __init__(self, data: bytes, field: str) -> None:
        super().__init__(data)
        self._field = field
        self._reads_left = 10_000 + len(data) // 64

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises TooLarge after too many of them."""
        self._reads_left -= 1
        if self._reads_left < 0:
            raise TooLarge("the image is made of too many parts", field=self._field)
        return super().read(size)


# Neither fill bytes, nor what stands for 0xff within a scan, nor restart markers, nor those without a length.
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")


def _check_markers(data: bytes, field: str) -> None:
    """Raises TooLarge for a JPEG of too many scans."""
    at = scans = markers = 0
    while (found := _MARKER.search(data, at)) and found[1] != b"\xd9":
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
        scans += found[1] == b"\xda"
        markers += 1
        if scans > MAX_SCANS or markers > MAX_MARKERS:
            raise TooLarge(f"the JPEG has more than {MAX_SCANS} scans or {MAX_MARKERS} segments", field=field)


_BYTES = (1, 2, 7)  # TIFF's types of tags that stay bytes or text
_LISTS = (258, 273, 279, 320, 324, 325, 338, 339)  # and the tags of which a list is made all the same


def _check_tags(data: bytes, field: str) -> None:
    """Raises TooLarge for a TIFF with more numbers in its first directory than a picture can need."""
    order, big = "<" if data.startswith(b"I") else ">", data[2:3] == b"+"  # as Pillow tells them apart
    first, length, tag = ("8xQ", "Q", "HHQ8x") if big else ("4xI", "H", "HHI4x")
    (at,) = struct.unpack_from(order + first, data)
    (tags,) = struct.unpack_from(order + length, data, at)
    at, size = at + struct.calcsize(order + length), struct.calcsize(order + tag)
    tags = min(tags, (len(data) - at) // size)
    entries = struct.iter_unpack(order + tag, data[at : at + tags * size])
    if sum(count for name, kind, count in entries if kind not in _BYTES or name in _LISTS) > MAX_NUMBERS:
        raise TooLarge(f"the TIFF has more than {MAX_NUMBERS} numbers in its tags", field=field)


def check_size(width: int, height: int, max_pixels: int, field: str) -> None:
    """Raises InvalidArgument for an empty picture, TooLarge for one of more than `max_pixels` or a side too long."""
    if width < 1 or height < 1:
        raise InvalidArgument(f"an image of {width}x{height} pixels has none", field=field)
    if max(width, height) > MAX_SIDE:
        raise TooLarge(
            f"a side of {max(width, height)} pixels is too long; at most {MAX_SIDE} are allowed", field=field
        )
    if width * height > max_pixels:
        raise TooLarge(
            f"an image of {width}x{height} pixels is larger than this server takes ({max_pixels} pixels); "
            "send a smaller one",
            field=field,
        )


def from_pixels(pixels: NDArray[np.uint8]) -> PIL.Image.Image:
    """[H, W, 3] uint8 → RGB picture."""
    return PIL.Image.fromarray(pixels)
