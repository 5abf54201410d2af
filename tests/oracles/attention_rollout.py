"""Attention rollout: Quantifying Attention Flow in Transformers.

Samira Abnar, Willem Zuidema, 2020, arXiv:2005.00928.

captum, torchcam and grad-cam do not have this method.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_rollout(attentions: Sequence[Tensor], grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """Return the map [h, w] ≥ 0 of the attentions [heads, L, L] of all blocks, whose rows add up to 1.

    The first `prefix` tokens are not patches. The class token is the first of them. The patches follow in row-major
    order.
    """
    identity = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype)
    rollout = identity
    for block in attentions:
        A = 0.5 * block.mean(0) + 0.5 * identity  # The identity is the residual connection.
        A = A / A.sum(-1, keepdim=True)
        rollout = A @ rollout
    return rollout[0, prefix:].reshape(grid)
