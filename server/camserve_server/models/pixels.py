"""Decoding of images, and their conversion to the model's input."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile
from torch import Tensor

from camserve_server.errors import InvalidArgument, TooLarge

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

# The longest side that JPEG allows. The memory of Pillow's resize filters grows with the longer side.
MAX_SIDE = 65_535
MAX_SCANS = 100  # scans of a JPEG; progressive files have about ten, and each costs a pass over all pixels
MAX_MARKERS = 10_000
MAX_NUMBERS = 200_000  # numbers in the tags of a TIFF: two for each of its strips or tiles


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of an image to the model's input: resize, scale to [0, 1], normalise.

    The whole image is resized and nothing is cropped, so the map covers the image that the caller sent, as in the
    Poly-CAM paper. The aspect ratio is not kept.

    Attributes:
        size: Height and width (H, W) of the input in pixels.
        mean: Mean of each channel: three numbers for colour, one for a grey-scale model. Models with other numbers of
            channels receive tensors only.
        std: Standard deviation of each channel.
        interpolation: Resize filter.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation

    def __str__(self) -> str:
        """Return the text that receipts contain."""
        height, width = self.size
        return f"squash {height}x{width} {self.interpolation}, mean {list(self.mean)}, std {list(self.std)}"

    @property
    def channels(self) -> int:
        """Number of channels C of the model's input."""
        return len(self.mean)

    def __call__(self, image: PIL.Image.Image | NDArray[np.uint8]) -> Tensor:
        """Convert an image to the model's input [C, H, W], float32, on the CPU.

        Args:
            image: RGB image, or its pixels [h, w, 3].
        """
        return self.normalised(self.resized(image))

    def resized(self, image: PIL.Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the pixels [H, W, C] of the model's input before they are normalised.

        For a grey-scale model, colours are converted by the luma of ITU-R BT.601. Pixels of the input's size need no
        resize. They are not copied to an image first.

        Args:
            image: RGB image, or its pixels [h, w, 3].
        """
        if isinstance(image, np.ndarray):
            if self.channels == 3 and image.shape[:2] == self.size:
                return image
            image = PIL.Image.fromarray(image)
        height, width = self.size
        resample = PIL.Image.Resampling[self.interpolation.upper()]
        image = image.convert("L") if self.channels == 1 else image
        return np.atleast_3d(np.asarray(image.resize((width, height), resample)))

    def normalised(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Return the model's input [C, H, W], float32, on the CPU, for pixels [H, W, C].

        NumPy and not torch computes it, because this code does not run on the engine's thread
        (engine/lanes/dispatch.py).
        """
        channels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        values = np.empty(channels.shape, np.float32)
        for channel, table in enumerate(self._tables):
            np.take(table, channels[channel], out=values[channel], mode="clip")  # other modes copy the result
        return torch.from_numpy(values)

    @cached_property
    def _tables(self) -> NDArray[np.float32]:
        """The normalised value of each of the 256 values of a pixel, for each channel [C, 256]."""
        values = np.arange(256, dtype=np.float32)[None] / 255
        mean, std = (np.array(each, dtype=np.float64)[:, None] for each in (self.mean, self.std))
        return ((values - mean) / std).astype(np.float32)

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel as [C, 1, 1], float64, which broadcast over an image."""
        mean, std = (torch.tensor(each, dtype=torch.float64).view(-1, 1, 1) for each in (self.mean, self.std))
        return mean, std


def decode(data: bytes, *, max_pixels: int, field: str) -> PIL.Image.Image:
    """Decode an image file.

    The size is checked before any pixel is decoded.

    Args:
        data: File in one of `FORMATS`.
        max_pixels: Largest number of pixels.
        field: Name of the request field, for the error.

    Returns:
        The image as RGB, rotated by its EXIF orientation, without its alpha channel.

    Raises:
        InvalidArgument: The image cannot be decoded, is empty, or has signed, 32-bit or floating-point pixels.
        TooLarge: The image has too many pixels, or its file has too many parts.
    """
    # Pillow also applies its own limit to tiles and frames; it must not be below the configured one.
    PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        if data.startswith(b"\xff\xd8"):
            _check_jpeg_markers(data, field)
        if data.startswith((b"II", b"MM")):
            _check_tiff_tags(data, field)
        image: PIL.Image.Image = PIL.Image.open(_ImageFile(data, field), formats=FORMATS)
        check_size(image.width, image.height, max_pixels, field)
        tags: Mapping[int, Any] = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        _check_pixel_type(image.mode, tags, field)
        PIL.ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # convert() would clip the values instead of scaling them
            image = _scaled_to_8_bits(image, tags)
        return image.convert("RGB")
    except (InvalidArgument, TooLarge):
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise TooLarge(
            f"the image has more pixels than this server accepts ({max_pixels}); send a smaller image", field=field
        ) from error
    except Exception as error:  # Pillow's decoders raise many kinds of exceptions on malformed data
        hint = "; a TIFF must contain 8-bit or unsigned 16-bit values" if data.startswith((b"II", b"MM")) else ""
        raise InvalidArgument(
            f"the image cannot be read ({type(error).__name__}); expected one of {', '.join(FORMATS)}{hint}",
            field=field,
            reason="UNREADABLE_IMAGE",
        ) from error


def _check_pixel_type(mode: str, tags: Mapping[int, Any], field: str) -> None:
    """Refuse signed, 32-bit and floating-point pixels, whose values for black and white are not defined.

    Pillow would clip them to [0, 255] without a warning.
    """
    signed = 2 in tags.get(SAMPLEFORMAT, ())
    if mode in ("I", "F") or signed:
        kind = "floating-point" if mode == "F" else "signed" if signed else "32-bit"
        raise InvalidArgument(
            f"the image has {kind} pixels, whose values for black and white are not defined; scale it to [0, 255] and "
            "save it with 8 bits, or send a preprocessed tensor",
            field=field,
            reason="UNREADABLE_IMAGE",
        )


def _scaled_to_8_bits(image: PIL.Image.Image, tags: Mapping[int, Any]) -> PIL.Image.Image:
    """Return a grey-scale image with up to 16 bits, mode "I;16…", as an 8-bit image.

    Pillow inverts images of up to 8 bits whose file says that zero is white, but not this one.
    """
    bits = tags.get(BITSPERSAMPLE, (16,))[0]  # 16, or 12 in some TIFF files
    values = np.asarray(image, dtype=np.uint16) >> (bits - 8)
    zero_is_white = tags.get(PHOTOMETRIC_INTERPRETATION) == 0
    return PIL.Image.fromarray((255 - values if zero_is_white else values).astype(np.uint8))


# Fewest of the 256 levels that the middle 98% of the pixels of a channel span without a warning. Values of 12 bits that
# a file stores in 16 bits without scaling span at most 16 levels.
MIN_LEVELS = 17


def contrast_warnings(pixels: NDArray[np.uint8]) -> tuple[str, ...]:
    """Return a warning about an image that is nearly constant, or nothing.

    Args:
        pixels: Pixels of the model's input [H, W, C] before they are normalised.
    """
    levels = 0
    for channel in range(pixels.shape[2]):
        levels = max(levels, _levels(pixels[..., channel]))
        if levels >= MIN_LEVELS:  # usually the first channel
            return ()
    return (
        f"nearly constant image: 98% of its pixels are within {levels} of 256 levels in each channel; check its bit "
        "depth and its scaling",
    )


def _levels(channel: NDArray[np.uint8]) -> int:
    """Return the number of levels from the 1st to the 99th percentile of a channel [H, W]."""
    counts = np.bincount(channel.ravel(), minlength=256).cumsum()
    low, high = np.searchsorted(counts, (0.01 * channel.size, 0.99 * channel.size))
    return int(high - low) + 1


class _ImageFile(io.BytesIO):
    """Encoded image with a limited number of reads.

    Pillow reads a header of millions of tiny parts one by one, which would take minutes and gigabytes.
    """

    def __init__(self, data: bytes, field: str) -> None:
        super().__init__(data)
        self._field = field
        self._reads_left = 10_000 + len(data) // 64

    def read(self, size: int | None = -1, /) -> bytes:
        """Read bytes; raise TooLarge after too many reads."""
        self._reads_left -= 1
        if self._reads_left < 0:
            raise TooLarge(
                "the image file consists of too many parts; save it again without metadata", field=self._field
            )
        return super().read(size)


# A marker with a length. Excluded are fill bytes, the escape for 0xff within a scan, restart markers, and the other
# markers without a length.
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")


def _check_jpeg_markers(data: bytes, field: str) -> None:
    """Raise TooLarge for a JPEG with too many scans or segments."""
    at = scans = markers = 0
    while (marker := _MARKER.search(data, at)) and marker[1] != b"\xd9":
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
        scans += marker[1] == b"\xda"
        markers += 1
        if scans > MAX_SCANS or markers > MAX_MARKERS:
            raise TooLarge(
                f"the JPEG has more than {MAX_SCANS} scans or {MAX_MARKERS} segments; save it again as a baseline JPEG",
                field=field,
            )


_BYTES = (1, 2, 7)  # types of TIFF tags that Pillow keeps as bytes or text
_LISTS = (258, 273, 279, 320, 324, 325, 338, 339)  # tags that Pillow converts to a list even if their type is in _BYTES


def _check_tiff_tags(data: bytes, field: str) -> None:
    """Raise TooLarge for a TIFF whose first directory contains more numbers than an image needs."""
    order, big = "<" if data.startswith(b"I") else ">", data[2:3] == b"+"  # the same test as Pillow's
    first, length, tag = ("8xQ", "Q", "HHQ8x") if big else ("4xI", "H", "HHI4x")
    (at,) = struct.unpack_from(order + first, data)
    (tags,) = struct.unpack_from(order + length, data, at)
    at, size = at + struct.calcsize(order + length), struct.calcsize(order + tag)
    tags = min(tags, (len(data) - at) // size)
    entries = struct.iter_unpack(order + tag, data[at : at + tags * size])
    if sum(count for name, kind, count in entries if kind not in _BYTES or name in _LISTS) > MAX_NUMBERS:
        raise TooLarge(
            f"the TIFF has more than {MAX_NUMBERS} numbers in its tags; save it again with fewer strips or tiles",
            field=field,
        )


def check_size(width: int, height: int, max_pixels: int, field: str) -> None:
    """Check the size of an image.

    Args:
        width: Width in pixels.
        height: Height in pixels.
        max_pixels: Largest number of pixels.
        field: Name of the request field, for the error.

    Raises:
        InvalidArgument: The image is empty.
        TooLarge: The image has more than `max_pixels` pixels or a side longer than `MAX_SIDE`.
    """
    if width < 1 or height < 1:
        raise InvalidArgument(
            f"the image has {width}x{height} pixels; expected at least one row and one column", field=field
        )
    if max(width, height) > MAX_SIDE:
        raise TooLarge(
            f"the longer side of the image has {max(width, height)} pixels; expected at most {MAX_SIDE}", field=field
        )
    if width * height > max_pixels:
        raise TooLarge(
            f"an image of {width}x{height} pixels is larger than this server accepts ({max_pixels} pixels); "
            "send a smaller image",
            field=field,
        )
