"""Images, maps and masks of a request: check their shapes without reading the pixels, then decode them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from camserve.v1 import explain_pb2 as pb
from camserve_server.errors import InvalidArgument, OutOfRange
from camserve_server.models.model import Model
from camserve_server.models.pixels import Preprocessing, check_size, contrast_warnings, decode


@dataclass(frozen=True)
class DataSizes:
    """Bytes of the data of a request. A front end removes the data, and the checks need only their sizes.

    Attributes:
        image: The size of the pixels or of the tensor; 0 for an encoded image.
        saliency: The size of the map; 0 if there is none.
        mask: The size of the mask; 0 if there is none.
    """

    image: int = 0
    saliency: int = 0
    mask: int = 0

    @classmethod
    def of(cls, request: pb.ExplainRequest | pb.EvaluateRequest) -> DataSizes:
        """Return the sizes of the data that a request contains."""
        saliency = request.saliency.data if isinstance(request, pb.EvaluateRequest) else b""
        image = request.image.tensor if request.image.HasField("tensor") else request.image.pixels
        return cls(len(image.data), len(saliency), len(request.truth.mask.data))


def check_image(image: pb.Image, data_bytes: int, model: Model, max_pixels: int) -> None:
    """Check the form, the size and the shape of an image without decoding it.

    Args:
        image: The image of the request.
        data_bytes: The size of its pixels or of its tensor.
        model: The model that the request names.
        max_pixels: The most pixels that the server accepts.

    Raises:
        InvalidArgument: The image is missing, or its data do not match its shape.
        TooLarge: The image has more pixels than the server accepts.
    """
    channels = model.preprocessing.channels
    if channels not in (1, 3) and image.WhichOneof("content") in ("encoded", "pixels"):
        raise InvalidArgument(
            f"{model.name} takes {channels} channels, which images do not have; send a tensor "
            f"[{channels}, height, width]",
            field="image",
        )
    match image.WhichOneof("content"):
        case "encoded":
            pass
        case "pixels":
            pixels = image.pixels
            check_size(pixels.width, pixels.height, max_pixels, "image.pixels")
            expected = 3 * pixels.height * pixels.width
            if data_bytes != expected:
                raise InvalidArgument(
                    f"the image has {data_bytes} bytes; expected {expected}: {pixels.height}x{pixels.width} "
                    "pixels of three bytes each",
                    field="image.pixels.data",
                    reason="WRONG_SHAPE",
                )
        case "tensor":
            shape = [*check_shape(image.tensor, data_bytes, "image.tensor")]
            wanted = [model.preprocessing.channels, *model.preprocessing.size]
            if shape != wanted:
                raise InvalidArgument(
                    f"the tensor has the shape {shape}; {model.name} expects {wanted}",
                    field="image.tensor.shape",
                    reason="WRONG_SHAPE",
                )
        case _:
            raise InvalidArgument("the image is missing; send encoded bytes, pixels or a tensor", field="image")


def decode_image(image: pb.Image, preprocessing: Preprocessing, max_pixels: int) -> tuple[Tensor, tuple[str, ...]]:
    """Decode and preprocess an image that `check_image` has accepted.

    Args:
        image: The image of the request. A tensor is used as it is.
        preprocessing: The preprocessing of the model.
        max_pixels: The most pixels of an encoded image.

    Returns:
        The input [C, H, W] of the model, float32, and warnings about the image. A tensor has no warnings, because its
        range is not known.

    Raises:
        InvalidArgument: The image cannot be read, or a value is not finite.
        TooLarge: The image has more pixels than the server accepts.
    """
    match image.WhichOneof("content"):
        case "encoded":
            decoded = decode(image.encoded, max_pixels=max_pixels, field="image.encoded")
            resized = preprocessing.resized(decoded)
        case "pixels":
            pixels = image.pixels
            values = np.frombuffer(pixels.data, np.uint8).reshape(pixels.height, pixels.width, 3)
            resized = preprocessing.resized(values)
        case _:
            return torch.from_numpy(_values(image.tensor, "image.tensor")), ()
    return preprocessing.normalised(resized), contrast_warnings(resized)


def digest(values: Tensor) -> str:
    """Return the digest of a tensor that receipts contain: "sha256:…" of its values, float32, little-endian."""
    array = np.ascontiguousarray(values.cpu().numpy(), "<f4")
    return f"sha256:{hashlib.sha256(array.data).hexdigest()}"


def check_saliency(saliency: pb.Tensor, data_bytes: int) -> None:
    """Check the shape of a map. Raises InvalidArgument unless it is [H, W]."""
    shape = [*check_shape(saliency, data_bytes, "saliency")]
    if len(shape) != 2:
        raise InvalidArgument(
            f"the saliency map has the shape {shape}; expected [H, W]", field="saliency.shape", reason="WRONG_SHAPE"
        )


def decode_saliency(saliency: pb.Tensor) -> Tensor:
    """Decode a map that `check_saliency` has accepted.

    Returns:
        The map [h, w] in [0, 1], float32.

    Raises:
        InvalidArgument: A value is not finite.
        OutOfRange: A value is not in [0, 1].
    """
    values = _values(saliency, "saliency")
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        raise OutOfRange(
            f"the saliency map has values from {low:g} to {high:g}; expected [0, 1]; scale the map first",
            field="saliency.data",
        )
    return torch.from_numpy(values)


def check_mask(mask: pb.Tensor, data_bytes: int) -> None:
    """Check the shape of a mask. Raises InvalidArgument unless it is [H, W]."""
    shape = [*check_shape(mask, data_bytes, "truth.mask")]
    if len(shape) != 2:
        raise InvalidArgument(
            f"the mask has the shape {shape}; expected [H, W]", field="truth.mask.shape", reason="WRONG_SHAPE"
        )


def decode_mask(mask: pb.Tensor, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode a mask that `check_mask` has accepted, and resize it to the input size of the model.

    Args:
        mask: Values in [0, 1]: 1 where the target is, 0 elsewhere.
        size: (H, W), the input size.

    Returns:
        A mask [H, W]; a pixel is true if at least half of it belongs to the target.

    Raises:
        InvalidArgument: A value is not finite, or no pixel is true.
        OutOfRange: A value is not in [0, 1].
    """
    values = _values(mask, "truth.mask")
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        raise OutOfRange(
            f"the mask has values from {low:g} to {high:g}; expected [0, 1]: 1 where the target is, 0 elsewhere",
            field="truth.mask.data",
        )
    height, width = size
    if values.shape != (height, width):
        # Pillow resizes it because only the engine's thread may do arithmetic on tensors: see engine/lanes/dispatch.py.
        values = np.asarray(PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.BILINEAR))
    target: NDArray[np.bool_] = values >= 0.5
    if not target.any():
        raise InvalidArgument(
            f"the mask has no pixel of the target left at the model's input size of {height}x{width}; "
            "mark a larger target",
            field="truth.mask.data",
        )
    return target


def check_shape(tensor: pb.Tensor, data_bytes: int, field: str) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises InvalidArgument if it is not float32, or the data do not match the shape."""
    if tensor.dtype not in ("", "float32"):
        raise InvalidArgument(
            f"the tensor has the type {tensor.dtype!r}; requests must contain float32 values; convert it",
            field=f"{field}.dtype",
        )
    shape = tuple(tensor.shape)
    if not 1 <= len(shape) <= 3 or min(shape) < 1 or data_bytes != 4 * math.prod(shape):
        raise InvalidArgument(
            f"the tensor has {data_bytes} bytes and the shape {[*shape]}; expected a shape of one to three "
            "numbers from 1 and four bytes (float32, little-endian) for each value",
            field=f"{field}.data",
            reason="WRONG_SHAPE",
        )
    return shape


def _values(tensor: pb.Tensor, field: str) -> NDArray[np.float32]:
    values = np.frombuffer(tensor.data, "<f4").astype(np.float32).reshape(tuple(tensor.shape))
    if not np.isfinite(values).all():
        raise InvalidArgument(
            "the tensor contains NaN or infinity; expected finite values", field=f"{field}.data", reason="NOT_FINITE"
        )
    return values
