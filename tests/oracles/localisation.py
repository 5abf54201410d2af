"""Localisation metrics as loops over pixels and boxes. SciPy labels the components."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.ndimage

Box = tuple[float, float, float, float]


def box_of_largest(mask: np.ndarray) -> Box:
    """Return the box (left, top, right, bottom) of the largest component. Right and bottom are exclusive."""
    labels, count = scipy.ndimage.label(mask)  # The default connects pixels by their sides.
    best: list[tuple[int, int]] = []
    for label in range(1, count + 1):
        pixels = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if labels[y, x] == label]
        if len(pixels) > len(best):
            best = pixels
    if not best:
        return (0, 0, 0, 0)
    ys, xs = [y for y, _ in best], [x for _, x in best]
    return (min(xs), min(ys), max(xs) + 1, max(ys) + 1)


def iou(a: Box, b: Box) -> float:
    """Return the IoU by counting cells of a fine grid. It is exact for boxes on sixths of pixels."""
    inside = [
        [box[0] <= (x + 0.5) / 6 < box[2] and box[1] <= (y + 0.5) / 6 < box[3] for box in (a, b)]
        for y in range(6 * math.ceil(max(a[3], b[3])))
        for x in range(6 * math.ceil(max(a[2], b[2])))
    ]
    return sum(all(two) for two in inside) / max(1, sum(any(two) for two in inside))


def max_iou(box: Box, boxes: Sequence[Box]) -> float:
    return max(iou(box, other) for other in boxes)


def b_p(S: np.ndarray) -> Box:
    mean = S.mean()
    return box_of_largest(mean < S)


def localisation_error(S: np.ndarray, boxes: Sequence[Box]) -> float:
    return 1 - max_iou(b_p(S), boxes)


def pixel_f1(S: np.ndarray, mask: np.ndarray) -> float:
    inside = sum(S[y, x] for y, x in np.ndindex(S.shape) if mask[y, x])
    precision, recall = inside / S.sum(), inside / mask.sum()
    return 2 * precision * recall / (precision + recall) if inside else 0.0


def energy(S: np.ndarray, mask: np.ndarray) -> float:
    return float(sum(S[y, x] for y, x in np.ndindex(S.shape) if mask[y, x]) / S.sum())


def pointing_game(S: np.ndarray, mask: np.ndarray, tolerance: int) -> float:
    y, x = max(np.ndindex(S.shape), key=lambda at: S[at])
    return float(any(mask[at] and math.hypot(at[0] - y, at[1] - x) <= tolerance for at in np.ndindex(S.shape)))


def box_accuracy(S: np.ndarray, boxes: Sequence[Box], deltas: Sequence[float]) -> tuple[float, list[float]]:
    curve = [max_iou(box_of_largest(i / 100 <= S), boxes) for i in range(100)]
    return sum(any(point >= delta for point in curve) for delta in deltas) / len(deltas), curve
