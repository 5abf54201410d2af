"""Attention rollout: Quantifying Attention Flow in Transformers.

Samira Abnar, Willem Zuidema, 2020, arXiv:2005.00928.

None of captum, torchcam and grad-cam has it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_rollout(attentions: Sequence[Tensor], grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """attentions, one a block, each [heads, L, L], rows adding up to 1 → map of the grid (h, w), ≥ 0.

    The class token is the first of `prefix` tokens that are no patches; the patches follow, row by row.
    """
    identity = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype)
    rollout = identity
    for block in attentions:
        A = 0.5 * block.mean(0) + 0.5 * identity  # the residual connection
        A = A / A.sum(-1, keepdim=True)
        rollout = A @ rollout
    return rollout[0, prefix:].reshape(grid)
