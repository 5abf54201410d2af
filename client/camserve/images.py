"""Images, and maps: from what a caller has to what the wire carries, and back."""

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

from camserve.errors import InvalidArgument, ResourceExhausted
from camserve.v1 import explain_pb2 as pb

__all__ = [
    "MAX_MESSAGE_BYTES",
    "ImageLike",
    "check_size",
    "from_wire",
    "map_to_wire",
    "mask_to_wire",
    "picture",
    "size",
    "to_wire",
]

# A path, an encoded file's bytes, a Pillow image, uint8 [H, W, 3] or [H, W], or float32 [3, H, W] or [1, H, W].
ImageLike: TypeAlias = "str | PathLike[str] | bytes | PIL.Image.Image | NDArray[np.uint8] | NDArray[np.float32]"

# The server takes no more either; gRPC's own limit, 4 MiB, is less than a photograph.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

# Pillow would clip these to [0, 255] without a word.
_DEEP_MODES = ("I", "F")

# EXIF's orientations 5 to 8 have width and height change places.
_FIRST_ON_ITS_SIDE = 5


def check_size(size_bytes: int, what: str) -> None:
    """Raises ResourceExhausted where `what` is too large to be sent."""
    if size_bytes > MAX_MESSAGE_BYTES:
        raise ResourceExhausted(
            f"{what} takes {size_bytes / 2**20:.1f} MiB, and a request at most {MAX_MESSAGE_BYTES / 2**20:.0f} MiB: "
            "send the compressed file instead of its pixels, or a smaller image",
            field="image",
            reason="TOO_LARGE",
        )


def to_wire(image: ImageLike) -> pb.Image:
    """The image as it is sent. Files and bytes go as they are; the server decodes them.

    Raises OSError for a file that cannot be read, InvalidArgument for an array of another shape or dtype or for a
    Pillow image of more than 8 bits, ResourceExhausted for one that is too large, TypeError for anything else.
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
                f"a Pillow image of mode {image.mode} has more than 8 bits: scale it to [0, 255] first", field="image"
            )
        return _pixels(np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB")))
    if isinstance(image, np.ndarray):
        return _array(image)
    raise TypeError(
        "image must be a path, bytes of an encoded file, a Pillow image or a numpy array, "
        f"not {type(image).__module__}.{type(image).__qualname__}"
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
            hint = ": drop the alpha, image[..., :3]"
        case _:
            hint = ""
    raise InvalidArgument(
        "an image array must be uint8 [H, W, 3] or [H, W], or float32 [3, H, W] (for a grey-scale model [1, H, W]) "
        f"that is already preprocessed, not {image.dtype} {list(image.shape)}{hint}",
        field="image",
    )


def _pixels(image: NDArray[np.generic]) -> pb.Image:
    return pb.Image(pixels=pb.Pixels(height=image.shape[0], width=image.shape[1], data=image.tobytes()))


def _tensor(array: NDArray[np.generic]) -> pb.Tensor:
    return pb.Tensor(shape=array.shape, data=array.astype("<f4", copy=False).tobytes())


def map_to_wire(saliency: object) -> pb.Tensor:
    """A saliency map, any real [H, W], as it is sent: float32. Raises InvalidArgument for another shape or dtype."""
    array = np.asarray(saliency)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InvalidArgument(
            f"a saliency map must be real numbers [H, W], not {array.dtype} {list(array.shape)}", field="saliency"
        )
    return _tensor(array)


def mask_to_wire(mask: object) -> pb.Tensor:
    """A mask, booleans or real numbers [H, W], as it is sent: float32. Raises InvalidArgument for anything else."""
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype.kind not in "bfiu":
        raise InvalidArgument(
            f"a mask must be booleans or numbers in [0, 1], [H, W], not {array.dtype} {list(array.shape)}",
            field="truth.mask",
        )
    return _tensor(array)


def size(image: pb.Image) -> tuple[int, int]:
    """(width, height) in pixels of the image that is sent, upright. Raises InvalidArgument for a file of no image."""
    match image.WhichOneof("content"):
        case "pixels":
            return (image.pixels.width, image.pixels.height)
        case "tensor":
            return (image.tensor.shape[-1], image.tensor.shape[-2])
        case _:
            try:
                with PIL.Image.open(io.BytesIO(image.encoded)) as file:
                    turned = file.getexif().get(PIL.ExifTags.Base.Orientation, 1) >= _FIRST_ON_ITS_SIDE
                    return (file.height, file.width) if turned else file.size
            except OSError as error:
                raise InvalidArgument(
                    f"the image cannot be read: {error}", field="image", reason="UNREADABLE_IMAGE"
                ) from error


def from_wire(tensor: pb.Tensor) -> NDArray[np.float32]:
    """The float32 array of the tensor's shape, a copy of its own."""
    return np.frombuffer(tensor.data, "<f4").astype(np.float32).reshape(tuple(tensor.shape))


def picture(image: pb.Image) -> PIL.Image.Image:
    """The image that was sent, as people see it: RGB at its full resolution, upright.

    A tensor is scaled from its smallest and largest finite value to [0, 255], all channels alike.
    """
    match image.WhichOneof("content"):
        case "pixels":
            return PIL.Image.frombytes("RGB", (image.pixels.width, image.pixels.height), image.pixels.data)
        case "tensor":
            x = from_wire(image.tensor)
            x = np.broadcast_to(x, (3, *x.shape[1:])).transpose(1, 2, 0)  # grey as three channels alike
            finite = x[np.isfinite(x)]
            low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
            scaled = (np.nan_to_num(x, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
            return PIL.Image.fromarray(np.rint(scaled * 255).astype(np.uint8))
        case _:
            with PIL.Image.open(io.BytesIO(image.encoded)) as file:
                return PIL.ImageOps.exif_transpose(file).convert("RGB")
