"""What a self-attention module attends to: its softmaxed weights, which fused kernels never show.

Only modules whose arithmetic is known to the last term are *understood*: torch.nn.MultiheadAttention, and the attention
of timm's vision transformers. Windows, relative position biases, rotary embeddings, pooled or linear attention are not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# timm moved the class from one module to the other. A subclass may do anything, so the type must be this one.
_TIMM = {("timm.layers.attention", "Attention"), ("timm.models.vision_transformer", "Attention")}


def attention_weights(module: nn.Module, x: Tensor) -> Tensor:
    """Input x [N, L, D] of an understood module → its weights [N, heads, L, L], each row a distribution over keys.

    No hook is triggered and the module stays as it is. Differentiable where grad mode is on. Raises TypeError for a
    module that is not understood.
    """
    return attend(module, x)[0]


def attend(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """As `attention_weights`, and the module's output [N, L, D]."""
    if not understood(module):
        raise TypeError(f"the attention of a {type(module).__name__} is not understood")
    if isinstance(module, nn.MultiheadAttention):
        output, weights = module.forward(x, x, x, need_weights=True, average_attn_weights=False)
        assert weights is not None  # they were asked for
        return weights, output
    return _timm(module, x)


def understood(module: nn.Module) -> bool:
    """Whether `attention_weights` knows all that the module does."""
    if type(module) is nn.MultiheadAttention:
        own = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
        return bool(module.batch_first) and own
    return (type(module).__module__, type(module).__name__) in _TIMM


def _timm(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    # `forward` throughout: calling the parts themselves would trigger the hooks that somebody may have on them.
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
