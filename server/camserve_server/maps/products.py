"""Sums of gradients, activations and their products that may consist of rounding errors."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest sum over positions, summed over channels, that counts as rounding, as a share of the sum of absolute values.
# Rounding in float32 reaches 2e-6. Gradients with random signs have sums of about 1/√(h·w), so rounding in bfloat16, up
# to 0.001, cannot be told from those of fine layers.
ROUNDING_OVER_POSITIONS = 2e-5

# What the caller can change if gradient times activation is zero.
OTHER_LAYER = (
    "in a transformer, name the normalisation that uses the output of the layer, such as blocks.11.norm1, instead of "
    "the layer"
)


def gradient_times_activation(g: Tensor, A: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Return relu(Σ_k g_k ⊙ A_k), or zeros if the sums of a map consist of rounding errors.

    The gradient through a layer norm is orthogonal to its input, so the sums of an input that nothing else uses are
    zero. Scaled to [0, 1], their rounding errors would look like a map.

    Args:
        g: Gradients [T, K, h, w].
        A: Activations [T, K, h, w].
        rounding: Largest sum that counts as zero, relative to the sum of absolute products.

    Returns:
        The maps [T, h, w], and True [T] for those that are zero because of rounding.
    """
    products = A * g
    S = products.sum(dim=1)
    of_terms = products.abs().sum(dim=1).amax(dim=(-2, -1))
    is_rounding = S.abs().amax(dim=(-2, -1)) < rounding * of_terms  # False if a value is not finite
    return torch.where(is_rounding[:, None, None], 0.0, S.relu()), is_rounding


def sums_are_rounding(values: Tensor) -> Tensor:
    """Return True [T, 1] where the sums over positions consist of rounding errors in all channels.

    The gradient of the input of an instance norm has the sum zero in each channel, and so has its output without an
    affine function.

    Args:
        values: Gradients or activations [T, K, h, w].
    """
    of_sums = values.sum(dim=(-2, -1)).abs().sum(dim=1)
    return (of_sums < ROUNDING_OVER_POSITIONS * values.abs().sum(dim=(1, 2, 3)))[:, None]
