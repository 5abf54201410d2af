"""Attention rollout: Quantifying Attention Flow in Transformers.

Abnar, Zuidema 2020, arXiv:2005.00928.
"""

from __future__ import annotations

import torch

from camserve_server.plan import CaptureAttention, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method


@method(
    "attention-rollout",
    title="Attention rollout",
    paper="arXiv:2005.00928",
    rows=lambda sizes: 1,
    needs="attention",
    class_agnostic=True,
)
def attention_rollout(x: Image, c: Targets) -> Plan[SaliencyMaps]:
    """Attention of the class token to each patch through all blocks: one forward pass, the same map for every class.

    Args:
        x: Image [3, H, W].
        c: T target classes.

    Returns:
        Maps [T, h, w] with one value per patch, in [0, 1].

    Equations:
        Ã_l = ½ mean over the heads of A_l + ½ I, each row divided by its sum
        S   = Ã_L … Ã_1, the row of the class token, without the tokens that are not of the image (eq. 1)

    Advice:
        Use it instead of raw attention, which uses only the last block. It cannot distinguish classes, and it treats
        attention as the only effect of a block.
    """
    attentions = yield from CaptureAttention(x)
    rollout = torch.eye(attentions.blocks[0].shape[-1], dtype=x.tensor.dtype, device=x.tensor.device)
    for block in attentions.blocks:
        A = 0.5 * block.mean(dim=0) + 0.5 * torch.eye(len(rollout), dtype=block.dtype, device=block.device)
        rollout = A / A.sum(dim=-1, keepdim=True) @ rollout  # eq. 1
    S = rollout[0, attentions.prefix :]
    return SaliencyMaps(S.reshape(1, *attentions.grid).expand(len(c), -1, -1))
