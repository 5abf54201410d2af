"""Batch norm and padding folded into convolutions: the same output with fewer passes over memory."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

# Classes are compared by name, because timm takes seconds to import and not every server needs it.
_BATCH_NORMS = {"torch.nn.modules.batchnorm.BatchNorm2d", "timm.layers.norm_act.BatchNormAct2d"}
# Largest difference of outputs, as a share of the largest value. Rounding stays far below it; a wrong fold, as of a
# convolution that the network uses twice, is far above it.
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class _Call:
    """Call of a module in a forward pass."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


@torch.no_grad()
def fold_padding(module: nn.Module, example: Tensor) -> None:
    """Replace timm's "same" convolutions by convolutions that pad their input themselves, in place.

    TensorFlow's "same" padding can have one pixel more on the right than on the left. Padding both sides by the larger
    number gives the same output if the kernel begins with a zero.

    Args:
        module: Network in evaluation mode.
        example: Input [1, C, H, W] that shows the sizes. A convolution that receives several sizes is not replaced.
    """
    calls: list[_Call] = []
    handles = [
        each.register_forward_hook(lambda of, args, output, name=name: calls.append(_Call(name, of, args[0], output)))
        for name, each in module.named_modules()
        if _kind(each) == "timm.layers.conv2d_same.Conv2dSame" and "weight" in each._parameters
    ]
    try:
        module(example)
    finally:
        for handle in handles:
            handle.remove()
    sizes = {call.name: {tuple(other.input.shape[-2:]) for other in calls if other.name == call.name} for call in calls}
    for call in calls:
        if len(sizes[call.name]) == 1 and type(call.module) is not nn.Conv2d:
            padded = _padded(call)
            if _close(padded(call.input), call.output):
                _replace(module, call.name, padded)


def _padded(call: _Call) -> nn.Conv2d:
    """Return a convolution that pads by itself and computes the same as the called one at this input size."""
    of = call.module
    assert isinstance(of, nn.Conv2d)
    more, padding = [], []
    for size, k, s, d in zip(call.input.shape[-2:], of.kernel_size, of.stride, of.dilation, strict=True):
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        padding.append(total - total // 2)
        more.append(total % 2)
    kernel = (of.kernel_size[0] + more[0], of.kernel_size[1] + more[1])
    padded = nn.Conv2d(of.in_channels, of.out_channels, kernel, groups=of.groups, bias=False)
    padded.stride, padded.dilation, padded.padding = of.stride, of.dilation, (padding[0], padding[1])
    weight = F.pad(of.weight, (more[1], 0, more[0], 0))
    padded.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    padded.bias = of.bias
    return padded.eval()


@torch.no_grad()
def fold_batch_norm(module: nn.Module, example: Tensor, keep: Collection[str] = ()) -> dict[str, str]:
    """Fold each batch norm into the convolution before it, in place.

    Nothing is folded if the logits would change.

    Args:
        module: Network in evaluation mode.
        example: Input [1, C, H, W]. Its forward pass shows which batch norm follows which convolution.
        keep: Names of convolutions that are not changed.

    Returns:
        Names of the convolutions that now also compute a batch norm, with the name of that batch norm.
    """
    before, pairs = _pairs(module, example)
    pairs = [pair for pair in pairs if pair[0].name not in keep]
    weights = [(conv.module.weight, conv.module.bias) for conv, _ in pairs]
    for conv, norm in pairs:
        _fold(module, conv, norm)
    after = module(example)
    if not _close(before, after):
        for (conv, norm), (weight, bias) in zip(pairs, weights, strict=True):
            conv.module.weight, conv.module.bias = weight, bias
            _replace(module, norm.name, norm.module)
        return {}
    return {conv.name: norm.name for conv, norm in pairs}


def _pairs(module: nn.Module, example: Tensor) -> tuple[Tensor, list[tuple[_Call, _Call]]]:
    """Return the logits of `example`, and each convolution with the batch norm that alone uses its output."""
    calls: list[_Call] = []
    handles = []
    for name, each in module.named_modules():
        if _is_convolution(each) or _is_batch_norm(each):

            def record(of: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                calls.append(_Call(name, of, args[0], output))

            handles.append(each.register_forward_hook(record))
    try:
        logits = module(example)
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(call.name for call in calls)
    # Ids are unique here, because each call keeps its tensors alive.
    convolutions = {id(call.output): call for call in calls if _is_convolution(call.module)}
    consumers = Counter(id(call.input) for call in calls)
    return logits, [
        (convolutions[id(call.input)], call)
        for call in calls
        if _is_batch_norm(call.module)
        and id(call.input) in convolutions
        and consumers[id(call.input)] == times[call.name] == times[convolutions[id(call.input)].name] == 1
    ]


def _is_convolution(module: nn.Module) -> bool:
    # A weight that is computed, as by weight_norm, is not a parameter and cannot be changed.
    return isinstance(module, nn.Conv2d) and "weight" in module._parameters


def _is_batch_norm(module: nn.Module) -> bool:
    return _kind(module) in _BATCH_NORMS and module.running_mean is not None


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE * float(a.abs().max()))


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _fold(module: nn.Module, conv: _Call, norm: _Call) -> None:
    """Change the weights of the convolution and replace the batch norm by the rest of it."""
    of, bn = conv.module, norm.module
    assert isinstance(of, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None and bn.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        of.weight.double(),
        None if of.bias is None else of.bias.double(),
        bn.running_mean.double(),
        bn.running_var.double(),
        bn.eps,
        bn.weight,
        bn.bias,
    )
    dtype = of.weight.dtype
    # empty_like keeps the memory format; a new parameter would be contiguous.
    of.weight = nn.Parameter(torch.empty_like(of.weight).copy_(weight), requires_grad=False)
    of.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    # timm's batch norm contains an activation, whose name may be that of a layer.
    rest = [(name, child) for name, child in bn.named_children()]
    _replace(module, norm.name, nn.Sequential(OrderedDict(rest)) if rest else nn.Identity())


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, new.eval())
