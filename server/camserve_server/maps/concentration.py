"""How a map's mass is spread over its pixels: evenly, or over a few of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of photographs and a trained network, no method's maps have less than 0.16; random pixels have 0.19, an even map 0.1.
EVEN = 0.12
# N ** 0.5 pixels: of 224 × 224, a line one pixel wide. A single position of a 7 × 7 layer, resized, has 0.73.
FEW = 0.5


def entropy(S: Tensor) -> float:
    """−Σ q log q / log N of q = S / ΣS over the N pixels, in [0, 1]: 1 for an even map, 0 for one of a single pixel.

    S [H, W], ≥ 0. N to its power is the number of pixels that, evenly filled, have the same entropy. A map of zeros
    counts as even.
    """
    values = S.double().flatten()
    mass = values.sum()
    if len(values) == 1 or not mass > 0:
        return 1.0
    q = values / mass
    return min(1.0, max(0.0, float(-torch.special.xlogy(q, q).sum()) / math.log(len(values))))


def top_decile_mass(S: Tensor) -> float:
    """Share of ΣS that the highest tenth of the pixels has, in [0.1, 1]: 0.1 for an even map.

    S [H, W], ≥ 0. Where a tenth is no whole number of pixels, the last one counts in part. A map of zeros counts as
    even.
    """
    values = S.double().flatten()
    mass = values.sum()
    if not mass > 0:
        return 0.1
    tenth = len(values) / 10
    highest = values.topk(math.ceil(tenth)).values
    return min(1.0, float((highest.sum() - (math.ceil(tenth) - tenth) * highest[-1]) / mass))


def warnings(S: Tensor) -> tuple[str, ...]:
    """What a reader of the map [H, W] must know of it if it is nearly even, or nearly all in a few pixels."""
    top = top_decile_mass(S)
    if top < EVEN:
        return (
            f"degenerate: the map is nearly even and tells no part of the image from another: "
            f"the highest tenth of its pixels has {top:.1%} of its mass",
        )
    spread = entropy(S)
    if spread < FEW:
        few = max(1, round(S.numel() ** spread))
        return (
            f"degenerate: the map is nearly all in a few pixels, as noise is in gradients: "
            f"it is as concentrated as {few:,} of {S.numel():,} pixels",
        )
    return ()
