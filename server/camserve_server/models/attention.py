"""Attention weights of self-attention modules.

Fused attention kernels do not return the softmaxed weights, so they are computed here from the module's input. Only
modules whose arithmetic is reproduced completely are supported: torch.nn.MultiheadAttention and the attention of timm's
vision transformers. Windows, relative position biases, rotary embeddings, pooled attention and linear attention are not
supported.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
# timm moved the class from one module to the other. A subclass may compute something else, so the type must match.
_TIMM = {("timm.layers.attention", "Attention"), ("timm.models.vision_transformer", "Attention")}


def attention_weights(module: nn.Module, x: Tensor) -> Tensor:
    """Compute the attention weights of a supported module.

    No hook is triggered and the module is not changed. The result is differentiable if grad mode is on.

    Args:
        module: Attention module for which `is_supported` returns True.
        x: Input of the module, [N, L, D].

    Returns:
        Weights [N, heads, L, L]; each row is a distribution over the keys.

    Raises:
        TypeError: The module is not supported.
    """
    return attention_with_output(module, x)[0]


def attention_with_output(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the attention weights of a supported module and its output.

    Args:
        module: Attention module for which `is_supported` returns True.
        x: Input of the module, [N, L, D].

    Returns:
        Weights [N, heads, L, L] and output [N, L, D].

    Raises:
        TypeError: The module is not supported.
    """
    if not is_supported(module):
        raise TypeError(
            f"the attention of a {type(module).__name__} is not supported; expected torch.nn.MultiheadAttention or "
            "timm's Attention"
        )
    if isinstance(module, nn.MultiheadAttention):
        output, weights = module.forward(x, x, x, need_weights=True, average_attn_weights=False)
        assert weights is not None, "need_weights=True returns weights"
        return weights, output
    return _timm(module, x)


def is_supported(module: nn.Module) -> bool:
    """Return True if `attention_weights` reproduces the arithmetic of the module."""
    if type(module) is nn.MultiheadAttention:
        own = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
        return bool(module.batch_first) and own
    return (type(module).__module__, type(module).__name__) in _TIMM


def attention_kinds(module: nn.Module) -> list[str]:
    """Return the class names of the attention modules in a network, supported or not."""
    return sorted({type(each).__name__ for each in module.modules() if ATTENTION.search(type(each).__name__)})


def _timm(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    # The parts are run by `forward`, because calling a module would trigger its hooks.
    N, L, _ = x.shape
    qkv = module.qkv.forward(x).reshape(N, L, 3, module.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = module.q_norm.forward(q), module.k_norm.forward(k)
    weights = (q * module.scale @ k.transpose(-2, -1)).softmax(dim=-1)
    output = (weights @ v).transpose(1, 2).flatten(2)
    if getattr(module, "norm", None) is not None:
        output = module.norm.forward(output)
    if getattr(module, "gate", None) is not None:
        output = output * module.gate.forward(x).sigmoid()
    return weights, module.proj.forward(output)
