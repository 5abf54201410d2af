"""Concentration of a map: the distribution of its mass over the pixels, and warnings about extreme cases."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Lowest top-decile mass without a warning. Maps of all methods for photographs and a trained network have at least
# 0.16, random pixels have 0.19, and an even map has 0.1.
MIN_TOP_DECILE_MASS = 0.12
# Lowest entropy without a warning: the entropy of N ** 0.5 pixels, for 224 × 224 a line one pixel wide. A single
# position of a 7 × 7 layer, resized, has 0.73.
MIN_ENTROPY = 0.5
# Every nth pixel is in the sample that the bounds of the top-decile mass use. The widths of images are seldom multiples
# of it, so the sample contains pixels of all columns.
SAMPLE_STEP = 17
# The bounds use float32 sums. Their relative error is far smaller than this.
ROUNDING = 1e-3


def entropy(S: Tensor) -> float:
    """Return the normalised entropy −Σ q log q / log N of q = S / ΣS over the N pixels.

    N to the power of the entropy is the number of pixels that have the same entropy if their values are equal.

    Args:
        S: Map [H, W], ≥ 0.

    Returns:
        The entropy, in [0, 1]: 1 for an even map, 0 for a map with a single pixel above zero. A map of zeros counts as
        even.
    """
    values = S.double().flatten()
    mass = values.sum()
    if len(values) == 1 or not mass > 0:
        return 1.0
    q = values / mass
    return min(1.0, max(0.0, float(-torch.special.xlogy(q, q).sum()) / math.log(len(values))))


def top_decile_mass(S: Tensor) -> float:
    """Return the share of ΣS in the highest tenth of the pixels.

    If a tenth is not a whole number of pixels, the last pixel counts in part.

    Args:
        S: Map [H, W], ≥ 0.

    Returns:
        The share, in [0.1, 1]: 0.1 for an even map. A map of zeros counts as even.
    """
    values = S.double().flatten()
    mass = values.sum()
    if not mass > 0:
        return 0.1
    tenth = len(values) / 10
    highest = values.topk(math.ceil(tenth)).values
    return min(1.0, float((highest.sum() - (math.ceil(tenth) - tenth) * highest[-1]) / mass))


def degenerate_warnings(S: Tensor) -> tuple[str, ...]:
    """Return warnings about a map that is nearly even or concentrated in a few pixels.

    NumPy computes them, because it is faster than torch for a single map.

    Args:
        S: Map [H, W], ≥ 0, on the host.

    Returns:
        At most one warning, which starts with "degenerate:".
    """
    least, most = _bounds_of_top_decile_mass(S.numpy().ravel())
    if least >= MIN_TOP_DECILE_MASS and _least_entropy(most, S.numel()) >= MIN_ENTROPY:
        return ()
    values = S.numpy().astype(np.float64).ravel()
    top = _top_decile_mass(values)
    if top < MIN_TOP_DECILE_MASS:
        return (
            f"degenerate: the map is nearly even and does not distinguish parts of the image: "
            f"the highest tenth of its pixels has {top:.1%} of its mass",
        )
    normalised_entropy = _entropy(values)
    if normalised_entropy < MIN_ENTROPY:
        few = max(1, round(S.numel() ** normalised_entropy))
        return (
            f"degenerate: the map is concentrated in a few pixels, which is typical of noisy gradients: "
            f"its entropy is that of {few:,} of {S.numel():,} pixels",
        )
    return ()


def _entropy(values: NDArray[np.float64]) -> float:
    """Return the `entropy` of the pixels [N] of a map."""
    mass = values.sum()
    if len(values) == 1 or not mass > 0:
        return 1.0
    q = values[values > 0] / mass
    return min(1.0, max(0.0, float(-(q * np.log(q)).sum()) / math.log(len(values))))


def _top_decile_mass(values: NDArray[np.float64]) -> float:
    """Return the `top_decile_mass` of the pixels [N] of a map."""
    mass = values.sum()
    if not mass > 0:
        return 0.1
    tenth = len(values) / 10
    count = math.ceil(tenth)
    highest = np.partition(values, len(values) - count)[len(values) - count :]
    return min(1.0, float((highest.sum() - (count - tenth) * highest.min()) / mass))


def _bounds_of_top_decile_mass(values: NDArray[np.float32]) -> tuple[float, float]:
    """Return a lower and an upper bound of the `top_decile_mass` of the pixels [N], without sorting all of them.

    A sample gives a threshold t that about a tenth of the pixels exceed. Their mass is exact, and the difference to a
    tenth of the pixels is bounded by t: a pixel above the threshold has at least the value t, another one at most.
    """
    mass = float(values.sum())
    if len(values) < SAMPLE_STEP**2 or not 0 < mass < math.inf:
        return 0.0, 1.0
    sample = values[::SAMPLE_STEP]
    threshold = float(np.partition(sample, len(sample) * 9 // 10)[len(sample) * 9 // 10])
    above = values > threshold
    count, highest = int(np.count_nonzero(above)), float(values @ above)
    tenth = len(values) / 10
    missing = (tenth - count) * threshold  # negative if too many pixels are above the threshold
    least = highest if count <= tenth else highest * tenth / count
    return least / mass - ROUNDING, min(1.0, (highest + missing) / mass + ROUNDING)


def _least_entropy(top: float, pixels: int) -> float:
    """Return a lower bound of the `entropy` of a map with at most this `top_decile_mass`, which takes much less time.

    The pixels outside of the highest tenth have the mass 1 − top. None of them is above the mean of the highest tenth,
    top / (0.1 · pixels), so each contributes at least its mass times the negative logarithm of that mean.
    """
    return (1 - top) * math.log(0.1 * pixels / top) / math.log(pixels) if pixels > 10 else 0.0
