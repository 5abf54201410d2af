"""Oracles of the attention of transformers: against values computed by hand and for a network of timm."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracles.attention_rollout import attention_rollout
from tests.oracles.raw_attention import raw_attention


def attention(blocks: int, heads: int, length: int, seed: int = 1) -> list[Tensor]:
    """Return random attention in float64, whose rows add up to 1."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.softmax(3 * torch.randn(heads, length, length, generator=generator).double(), -1) for _ in range(blocks)
    ]


def of_timm(net: Any, x: Tensor) -> list[Tensor]:
    """Return the attention [heads, L, L] of each block, which multiplies the values."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append(output.detach()[0])

    handles = []
    for block in net.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(keep))
    try:
        with torch.no_grad():
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_raw_attention_is_the_row_of_the_class_token_in_the_last_block() -> None:
    A = attention(3, 2, 7)
    ours = raw_attention(A, (2, 3))
    for i, j in itertools.product(range(2), range(3)):
        token = 1 + 3 * i + j
        assert ours[i, j].item() == pytest.approx((A[2][0, 0, token] + A[2][1, 0, token]).item() / 2)
    assert ours.sum() < 1  # The rest is the attention of the class token to itself.
    two = raw_attention(A, (1, 5), prefix=2)
    assert torch.equal(two, ours.flatten()[None, 1:])


def test_rollout_sums_all_paths_through_the_blocks() -> None:
    """A path from the class token to a patch stays at its token or follows the attention in each block."""
    A = attention(3, 2, 5)
    mixed = [0.5 * (block[0] + block[1]) / 2 + 0.5 * torch.eye(5) for block in A]
    flow = torch.zeros(5).double()
    for first, second, token in itertools.product(range(5), repeat=3):
        flow[token] += mixed[2][0, first] * mixed[1][first, second] * mixed[0][second, token]
    assert flow.sum().item() == pytest.approx(1)
    torch.testing.assert_close(attention_rollout(A, (2, 2)), flow[1:].reshape(2, 2))
    torch.testing.assert_close(attention_rollout(A, (1, 3), prefix=2), flow[None, 2:])
    assert not torch.allclose(attention_rollout(A[::-1], (2, 2)), flow[1:].reshape(2, 2))


def test_rollout_of_one_block_is_half_its_raw_attention() -> None:
    A = attention(1, 3, 7)
    torch.testing.assert_close(attention_rollout(A, (2, 3)), raw_attention(A, (2, 3)) / 2)


def test_rollout_is_zero_if_tokens_attend_only_to_themselves() -> None:
    still = [torch.eye(5).expand(2, 5, 5)] * 3
    assert attention_rollout(still, (2, 2)).abs().max() == 0


def test_rollout_scales_rows_that_do_not_add_up_to_one() -> None:
    A = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])  # Half of it plus half of the identity: 1 and 1, out of 2.
    assert attention_rollout([A], (1, 1)).item() == 0.5


def test_attention_oracles_on_a_vision_transformer() -> None:
    import camserve_server.torch_setup.torchvision_ops  # noqa: F401, I001 (lets timm be imported)
    import timm

    torch.manual_seed(0)
    net: Any = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=(48, 32), depth=3).eval().double()
    for block in net.blocks:
        block.attn.qkv.weight.data.mul_(20)  # Random weights give nearly uniform attention.
    A = of_timm(net, torch.randn(1, 3, 48, 32).double())
    assert [tuple(block.shape) for block in A] == [(3, 7, 7)] * 3
    raw, rollout = raw_attention(A, (3, 2)), attention_rollout(A, (3, 2))
    for ours in (raw, rollout):
        assert ours.shape == (3, 2)
        assert 0 <= ours.min() < ours.max() < 1
    assert 0 < rollout.sum() < 1 - 0.5**3  # At least 1/8 stays at the class token.
    assert not torch.allclose(raw / raw.max(), rollout / rollout.max(), atol=0.01)
