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
    """What the class token attends to through all blocks: one forward pass, the same map for every class.

    x [3, H, W], c [T] class indices → maps [T, h, w] of the grid of tokens, in [0, 1].

    Equations:
        Ã_l = ½ mean over the heads of A_l + ½ I, each row divided by its sum
        S   = Ã_L … Ã_1, the row of the class token, without the tokens that are not of the image (eq. 1)

    Advice:
        Take it rather than raw attention, which sees the last block alone. It cannot explain one class against another,
        and it takes attention for all that a block does.
    """
    attentions = yield from CaptureAttention(x)
    rollout = torch.eye(attentions.blocks[0].shape[-1], dtype=x.tensor.dtype, device=x.tensor.device)
    for block in attentions.blocks:
        A = 0.5 * block.mean(dim=0) + 0.5 * torch.eye(len(rollout), dtype=block.dtype, device=block.device)
        rollout = A / A.sum(dim=-1, keepdim=True) @ rollout  # eq. 1
    S = rollout[0, attentions.prefix :]
    return SaliencyMaps(S.reshape(1, *attentions.grid).expand(len(c), -1, -1))
