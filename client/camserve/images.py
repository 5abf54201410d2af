"""Conversion of images, masks and saliency maps to messages and back."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray
from PIL import TiffImagePlugin

from camserve.errors import InternalError, InvalidArgument, TooLarge
from camserve.v1 import explain_pb2 as pb

__all__ = [
    "MAX_MESSAGE_BYTES",
    "ImageLike",
    "check_size",
    "from_wire",
    "map_to_wire",
    "mask_to_wire",
    "size",
    "to_pillow",
    "to_wire",
    "upright_rgb",
]

# Path, bytes of an encoded file, Pillow image, uint8 [H, W, 3] or [H, W], or float32 [3, H, W] or [1, H, W].
ImageLike: TypeAlias = "str | PathLike[str] | bytes | PIL.Image.Image | NDArray[np.uint8] | NDArray[np.float32]"

# The server has the same limit. The default limit of gRPC, 4 MiB, is too small for many photographs.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

# Pillow would clip the values of these modes to [0, 255] without a warning.
_DEEP_MODES = ("I", "F")

# NumPy types of the types of tensor messages.
_DTYPES = {"": "<f4", "float32": "<f4", "float16": "<f2", "uint8": "u1"}

# The EXIF orientations from 5 to 8 exchange width and height.
_FIRST_TRANSPOSED_ORIENTATION = 5


def check_size(size_bytes: int, name: str) -> None:
    """Check that an object is not too large for a request.

    Args:
        size_bytes: Size of the object in bytes.
        name: Name of the object in the error message.

    Raises:
        TooLarge: The object is larger than `MAX_MESSAGE_BYTES`.
    """
    if size_bytes > MAX_MESSAGE_BYTES:
        raise TooLarge(
            f"{name} has {size_bytes / 2**20:.1f} MiB; expected at most {MAX_MESSAGE_BYTES / 2**20:.0f} MiB for a "
            "request; send the compressed file instead of its pixels, or a smaller image",
            field="image",
            reason="TOO_LARGE",
        )


def to_wire(image: ImageLike) -> pb.Image:
    """Convert an image to a message. Encoded files are not decoded, because the server decodes them.

    Args:
        image: The image.

    Returns:
        The message.

    Raises:
        OSError: The file cannot be read.
        InvalidArgument: An array has the wrong shape or dtype, or a Pillow image has more than 8 bits per channel.
        TooLarge: The file is too large for a request.
        TypeError: The image has another type.
    """
    if isinstance(image, str | PathLike):
        path = Path(image)
        check_size(path.stat().st_size, str(path))
        return pb.Image(encoded=path.read_bytes())
    if isinstance(image, bytes):
        return pb.Image(encoded=image)
    if isinstance(image, PIL.Image.Image):
        if image.mode.startswith(_DEEP_MODES):
            raise InvalidArgument(
                f"the Pillow image has mode {image.mode} with more than 8 bits; scale it to [0, 255] and convert it "
                "to RGB",
                field="image",
            )
        return _pixels(np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB")))
    if isinstance(image, np.ndarray):
        return _array(image)
    raise TypeError(
        f"image is a {type(image).__module__}.{type(image).__qualname__}; expected a path, bytes of an encoded file, a "
        "Pillow image or a numpy array"
    )


def _array(image: NDArray[np.generic]) -> pb.Image:
    match image.dtype.newbyteorder("="), image.shape:
        case (np.uint8, (_, _, 3)):
            return _pixels(image)
        case (np.uint8, (_, _)):
            return _pixels(np.repeat(image[..., None], 3, axis=2))
        case (np.float32, (1 | 3, _, _)):
            return pb.Image(tensor=_tensor(image))
        case (np.uint8, (_, _, 4)):
            hint = "; remove the alpha channel with image[..., :3]"
        case _:
            hint = ""
    raise InvalidArgument(
        f"the image array is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3] or [H, W], or preprocessed "
        f"float32 [3, H, W] ([1, H, W] for a grey-scale model){hint}",
        field="image",
    )


def _pixels(image: NDArray[np.generic]) -> pb.Image:
    return pb.Image(pixels=pb.Pixels(height=image.shape[0], width=image.shape[1], data=image.tobytes()))


def _tensor(array: NDArray[np.generic]) -> pb.Tensor:
    return pb.Tensor(shape=array.shape, data=array.astype("<f4", copy=False).tobytes())


def map_to_wire(saliency: object) -> pb.Tensor:
    """Convert a saliency map to a message.

    Args:
        saliency: Real numbers [H, W].

    Returns:
        The map as float32.

    Raises:
        InvalidArgument: The map has another shape or dtype.
    """
    array = np.asarray(saliency)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InvalidArgument(
            f"the saliency map is {array.dtype} {list(array.shape)}; expected real numbers [H, W]", field="saliency"
        )
    return _tensor(array)


def mask_to_wire(mask: object) -> pb.Tensor:
    """Convert a mask to a message.

    Args:
        mask: Booleans or real numbers [H, W].

    Returns:
        The mask as float32.

    Raises:
        InvalidArgument: The mask has another shape or dtype.
    """
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype.kind not in "bfiu":
        raise InvalidArgument(
            f"the mask is {array.dtype} {list(array.shape)}; expected booleans or numbers in [0, 1], [H, W]",
            field="truth.mask",
        )
    return _tensor(array)


def size(image: pb.Image) -> tuple[int, int]:
    """Return the size of an image after its EXIF orientation is applied.

    Args:
        image: The image as a message.

    Returns:
        (width, height) in pixels.

    Raises:
        InvalidArgument: The encoded file is not an image that Pillow can read.
    """
    match image.WhichOneof("content"):
        case "pixels":
            return (image.pixels.width, image.pixels.height)
        case "tensor":
            return (image.tensor.shape[-1], image.tensor.shape[-2])
        case _:
            try:
                with PIL.Image.open(io.BytesIO(image.encoded)) as file:
                    orientation = file.getexif().get(PIL.ExifTags.Base.Orientation, 1)
                    transposed = orientation >= _FIRST_TRANSPOSED_ORIENTATION
                    return (file.height, file.width) if transposed else file.size
            except OSError as error:
                raise InvalidArgument(
                    f"the image cannot be read: {error}", field="image", reason="UNREADABLE_IMAGE"
                ) from error


def from_wire(tensor: pb.Tensor) -> NDArray[np.float32]:
    """Convert a tensor message to an array.

    Args:
        tensor: The message.

    Returns:
        A new float32 array of the shape of the tensor. uint8 values are divided by 255.

    Raises:
        InternalError: The type of the values is unknown.
    """
    if tensor.dtype not in _DTYPES:
        raise InternalError(
            f"the response contains a tensor of type {tensor.dtype!r}, which this version of camserve cannot read; "
            "install a newer version, or request another type"
        )
    values = np.frombuffer(tensor.data, _DTYPES[tensor.dtype]).astype(np.float32).reshape(tuple(tensor.shape))
    return values / np.float32(255) if tensor.dtype == "uint8" else values


def to_pillow(image: pb.Image) -> PIL.Image.Image:
    """Convert an image message to an RGB image for display.

    Args:
        image: The image as a message.

    Returns:
        The upright image at its full resolution. For a tensor, the range from the smallest to the largest finite value
        of all channels is scaled to [0, 255].
    """
    match image.WhichOneof("content"):
        case "pixels":
            return PIL.Image.frombytes("RGB", (image.pixels.width, image.pixels.height), image.pixels.data)
        case "tensor":
            x = from_wire(image.tensor)
            x = np.broadcast_to(x, (3, *x.shape[1:])).transpose(1, 2, 0)  # A grey-scale tensor has a single channel.
            finite = x[np.isfinite(x)]
            low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
            scaled = (np.nan_to_num(x, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
            return PIL.Image.fromarray(np.rint(scaled * 255).astype(np.uint8))
        case _:
            with PIL.Image.open(io.BytesIO(image.encoded)) as file:
                return upright_rgb(file)


def upright_rgb(file: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an opened image file to an upright RGB image, with the same brightness as on the server.

    Args:
        file: The opened file. A grey-scale image may have up to 16 bits.
    """
    tags = getattr(file, "tag_v2", {})  # of a TIFF
    upright = PIL.ImageOps.exif_transpose(file)
    if upright.mode.startswith("I;16"):  # convert() would clip the values instead of scaling them
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        values = np.asarray(upright, dtype=np.uint16) >> (bits - 8)
        zero_is_white = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        upright = PIL.Image.fromarray((255 - values if zero_is_white else values).astype(np.uint8))
    return upright.convert("RGB")
