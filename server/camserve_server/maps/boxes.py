"""Boxes: (left, top, right, bottom) in pixels, half-open; how they overlap, and the box of what stands out in a map.

In NumPy, as requests are read beside the engine's thread: see device/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from camserve_server.plan import Box, Truth


def truth(boxes: Sequence[Box], mask: NDArray[np.bool_] | None, size: tuple[int, int]) -> Truth:
    """What boxes, a mask [H, W] that is not empty, or both say about where the target is; `size` is (H, W).

    Boxes without a mask have the pixels whose centre lies in one of them, at least one each; a mask without boxes has
    the one around all of it.
    """
    if mask is None:
        mask = np.zeros(size, np.bool_)
        for left, top, right, bottom in boxes:
            mask[_centres(top, bottom, size[0]), _centres(left, right, size[1])] = True
    return Truth(torch.from_numpy(mask), tuple(boxes) or (_around(mask),))


def _centres(low: float, high: float, size: int) -> slice:
    """The pixels i whose centre i + ½ lies in [low, high); one nearby if there is none."""
    start = min(math.ceil(low - 0.5), size - 1)
    return slice(start, max(math.ceil(high - 0.5), start + 1))


def _around(mask: NDArray[np.bool_]) -> Box:
    """The box around all of a mask [H, W] that is not empty."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def overlap(box: Box, others: Sequence[Box]) -> float:
    """The highest intersection over union of the box with one of the others, in [0, 1]."""
    return max(_iou(box, other) for other in others)


def _iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / (area(a) + area(b) - both)


def area(box: Box) -> float:
    """In pixels."""
    return (box[2] - box[0]) * (box[3] - box[1])


def largest(mask: NDArray[np.bool_]) -> Box:
    """[H, W] → the box around its largest component, the first one of equals; (0, 0, 0, 0) for an empty mask.

    Pixels are connected by their sides, not by their corners, as by default in SciPy. What is connected here is runs:
    pixels side by side in a row. A map of 224×224 has some hundred of them, which takes a quarter of a millisecond; a
    loop over its pixels would hold the engine for longer than a batch does.
    """
    height, width = mask.shape
    wide = width + 1  # with an empty column at the end of each row, so that no run goes on in the next one
    padded = np.zeros((height, wide), np.int8)
    padded[:, :width] = mask
    ends = np.flatnonzero(np.diff(padded.ravel(), prepend=0))
    start, stop = ends[::2], ends[1::2]
    if not len(start):
        return (0.0, 0.0, 0.0, 0.0)
    # Run i is touched from below by those from the first that ends behind its start on, before the first that starts
    # behind its end.
    first, last = np.searchsorted(stop, start + wide, side="right"), np.searchsorted(start, stop + wide)
    counts = last - first
    above = np.repeat(np.arange(len(start)), counts)
    below = np.arange(len(above)) + np.repeat(first - (counts.cumsum() - counts), counts)
    component = _connected(len(start), above, below)
    runs = np.flatnonzero(component == np.bincount(component, weights=stop - start).argmax())
    rows, left, right = start[runs] // wide, start[runs] % wide, stop[runs] % wide
    return (float(left.min()), float(rows[0]), float(right.max()), float(rows[-1] + 1))


def _connected(count: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """The component of each of `count` things, a[i] touching b[i]: the number of the first thing in it."""
    root = np.arange(count)
    while len(a):
        # Of two roots that touch the later one gets under the earlier one, then all under the root of their root.
        a, b = root[a], root[b]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root[root] != root).any():
            root = root[root]
        apart = root[a] != root[b]
        a, b = a[apart], b[apart]
    return root
