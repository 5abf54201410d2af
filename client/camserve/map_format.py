"""Formats of the maps in responses: the type of their values, and their native resolution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from camserve import images
from camserve.v1 import explain_pb2 as pb

__all__ = ["from_wire", "restored", "to_wire"]


def to_wire(map_dtype: str | None, native_maps: bool) -> pb.MapFormat | None:
    """Return the message that selects a format, or None for the default."""
    if map_dtype is None and not native_maps:
        return None
    return pb.MapFormat(dtype=map_dtype or "", native=native_maps)


def from_wire(tensor: pb.Tensor, input_size: Sequence[int]) -> NDArray[np.float32]:
    """Convert a map of a response.

    Args:
        tensor: The map.
        input_size: [H, W], the size of a map that was requested at native resolution. Empty for other maps.

    Returns:
        A new float32 array [H, W] in [0, 1].

    Raises:
        InternalError: The type of the values is unknown.
    """
    values = images.from_wire(tensor)
    size = tuple(input_size)
    return restored(values, (size[0], size[1])) if len(size) == 2 and values.shape != size else values


def restored(native: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return the map at the model's input size from the map at native resolution.

    The map is resized bilinearly without aligned corners and without antialiasing, then scaled by its minimum and
    maximum. The server does the same in torch.

    Args:
        native: The map [h, w].
        size: (H, W) of the result.

    Returns:
        The map, float32 [H, W] in [0, 1]. A constant map becomes zeros.
    """
    top, bottom, down = _neighbours(native.shape[0], size[0])
    left, right, across = _neighbours(native.shape[1], size[1])
    rows = (1 - across) * native[:, left] + across * native[:, right]
    resized = (1 - down)[:, None] * rows[top] + down[:, None] * rows[bottom]
    low = resized.min()
    span = resized.max() - low
    if native.min() == native.max() or not span:
        return np.zeros(size, np.float32)
    scaled: NDArray[np.float32] = (resized - low) / span
    return scaled


def _neighbours(length: int, new_length: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Return the two positions between which each new position is interpolated, and the weight of the second one."""
    # torch computes positions in float32 with fused multiply-add. Their rounding can change a map by more than 1e-6, so
    # this function rounds them in the same way: the product is exact in float64.
    scale = np.float64(np.float32(length) / np.float32(new_length))
    at = (scale * (np.arange(new_length) + 0.5) - 0.5).astype(np.float32).clip(0, length - 1)
    first = at.astype(np.intp)
    return first, np.minimum(first + 1, length - 1), at - first.astype(np.float32)
