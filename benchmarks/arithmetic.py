"""Arithmetic of other implementations: that of torch's defaults, or that of the served model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Permit or forbid TF32 inside the context.

    Unlike the engine, the context leaves the choice of the fastest convolutions to cuDNN.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def with_dtype(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a network that computes in a data type, and whose inputs and logits have that of `net`.

    Args:
        net: Network whose weights have one floating-point type. It is returned itself if its type is `dtype`.
        dtype: Data type of the arithmetic.
    """
    own = next((weight.dtype for weight in net.parameters()), dtype)
    if own == dtype:
        return net
    converted = copy.deepcopy(net).to(dtype)
    converted.register_forward_pre_hook(partial(_convert_input, dtype))
    converted.register_forward_hook(partial(_convert_output, own))
    return converted


def _convert_input(dtype: torch.dtype, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.to(dtype) for each in args)


def _convert_output(dtype: torch.dtype, module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output.to(dtype)
