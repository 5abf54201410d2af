"""Boxes (left, top, right, bottom) in pixels: ground truth, overlap, and the box of the largest component of a mask.

Right and bottom are exclusive. The module uses NumPy, because the service reads ground truth outside the engine's
thread, and only that thread may do arithmetic on tensors (docs/decisions/0009).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from camserve_server.plan import Box, Truth


def make_truth(boxes: Sequence[Box], mask: NDArray[np.bool_] | None, size: tuple[int, int]) -> Truth:
    """Combine boxes and a mask into ground truth.

    Boxes without a mask cover the pixels whose centre lies in at least one of them, and at least one pixel each. A mask
    without boxes gets one box around all of its pixels.

    Args:
        boxes: Boxes around the target. May be empty if there is a mask.
        mask: Pixels of the target [H, W], at least one of them True, or None.
        size: Height and width (H, W) of the model's input in pixels.

    Returns:
        The ground truth, with both a mask and boxes.
    """
    if mask is None:
        mask = np.zeros(size, np.bool_)
        for left, top, right, bottom in boxes:
            mask[_covered(top, bottom, size[0]), _covered(left, right, size[1])] = True
    return Truth(torch.from_numpy(mask), tuple(boxes) or (_bounding_box(mask),))


def _covered(low: float, high: float, size: int) -> slice:
    """Return the pixels i whose centre i + ½ lies in [low, high), or the nearest pixel if there is none."""
    start = min(math.ceil(low - 0.5), size - 1)
    return slice(start, max(math.ceil(high - 0.5), start + 1))


def _bounding_box(mask: NDArray[np.bool_]) -> Box:
    """Return the box around all pixels of a non-empty mask [H, W]."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def max_iou(box: Box, others: Sequence[Box]) -> float:
    """Return the highest intersection over union of a box with other boxes.

    Args:
        box: The box.
        others: At least one other box.

    Returns:
        The highest IoU, in [0, 1].
    """
    return max(_iou(box, other) for other in others)


def _iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    return intersection / (area(a) + area(b) - intersection)


def area(box: Box) -> float:
    """Return the area of a box in square pixels.

    Args:
        box: The box.

    Returns:
        Width times height.
    """
    return (box[2] - box[0]) * (box[3] - box[1])


def largest_component_box(mask: NDArray[np.bool_]) -> Box:
    """Return the box around the largest connected component of a mask.

    Pixels are connected by their sides, not by their corners, as by default in SciPy. The function connects runs:
    adjacent pixels of one row of the mask. A map of 224×224 has some hundred runs, which take a quarter of a
    millisecond. A loop over its pixels would occupy the engine's thread for longer than a batch.

    Args:
        mask: The mask [H, W].

    Returns:
        The box. If several components have the same number of pixels, the first one in row-major order counts. An
        empty mask gives (0, 0, 0, 0).
    """
    height, width = mask.shape
    stride = width + 1  # One empty column at the end of each row separates its last run from the next row.
    padded = np.zeros((height, stride), np.int8)
    padded[:, :width] = mask
    edges = np.flatnonzero(np.diff(padded.ravel(), prepend=0))
    start, stop = edges[::2], edges[1::2]
    if not len(start):
        return (0.0, 0.0, 0.0, 0.0)
    # Runs of the next row that touch run i: from the first one that stops after the start of run i, to the last one
    # that starts before the stop of run i.
    first, last = np.searchsorted(stop, start + stride, side="right"), np.searchsorted(start, stop + stride)
    counts = last - first
    above = np.repeat(np.arange(len(start)), counts)
    below = np.arange(len(above)) + np.repeat(first - (counts.cumsum() - counts), counts)
    component = _components(len(start), above, below)
    runs = np.flatnonzero(component == np.bincount(component, weights=stop - start).argmax())
    rows, left, right = start[runs] // stride, start[runs] % stride, stop[runs] % stride
    return (float(left.min()), float(rows[0]), float(right.max()), float(rows[-1] + 1))


def _components(count: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the component of each of `count` nodes, where edges connect a[i] and b[i], as its lowest node."""
    root = np.arange(count)
    while len(a):
        # Attach the later of two connected roots to the earlier one, then shorten all paths to their root.
        a, b = root[a], root[b]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root[root] != root).any():
            root = root[root]
        separate = root[a] != root[b]
        a, b = a[separate], b[separate]
    return root
