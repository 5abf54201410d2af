"""Concentration of a map: the distribution of its mass over the pixels, and warnings about extreme cases."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Lowest top-decile mass without a warning. Maps of all methods for photographs and a trained network have at least
# 0.16, random pixels have 0.19, and an even map has 0.1.
MIN_TOP_DECILE_MASS = 0.12
# Lowest entropy without a warning: the entropy of N ** 0.5 pixels, for 224 × 224 a line one pixel wide. A single
# position of a 7 × 7 layer, resized, has 0.73.
MIN_ENTROPY = 0.5


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

    Args:
        S: Map [H, W], ≥ 0.

    Returns:
        At most one warning, which starts with "degenerate:".
    """
    top = top_decile_mass(S)
    if top < MIN_TOP_DECILE_MASS:
        return (
            f"degenerate: the map is nearly even and does not distinguish parts of the image: "
            f"the highest tenth of its pixels has {top:.1%} of its mass",
        )
    normalised_entropy = entropy(S)
    if normalised_entropy < MIN_ENTROPY:
        few = max(1, round(S.numel() ** normalised_entropy))
        return (
            f"degenerate: the map is concentrated in a few pixels, which is typical of noisy gradients: "
            f"its entropy is that of {few:,} of {S.numel():,} pixels",
        )
    return ()
