"""Copies of a model on further devices."""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch import Tensor, nn

from camserve_server.models.model import Model
from camserve_server.models.throughput import Throughput


def copied(model: Model, device: torch.device, name: str) -> Model:
    """Return a copy of a model on another device of the same kind, at all of its precisions.

    The copy has weights of its own. It shares `batch_sizes` with the model: devices of one kind must run the same batch
    sizes to give the same bits, also after one of them has run out of memory.

    Args:
        model: Model that is not used by other threads meanwhile.
        device: Device of the copy.
        name: Name of the device.

    Raises:
        torch.OutOfMemoryError: The copy does not fit into the memory of the device.
    """
    modules: dict[nn.Module, nn.Module] = {}  # precisions with the same type of weights share a network
    copies: dict[str, Model] = {}
    for precision, each in model.precisions.items():
        if each.module not in modules:
            modules[each.module] = _copied_module(each.module, device)
        copies[precision] = each.with_module(
            modules[each.module],
            device=device,
            device_name=name,
            others={},
            unavailable={},
            equal_sizes={},
            throughput=defaultdict(Throughput),
        )
    result = copies.pop(model.precision)
    result.others = {each.precision: each for each in copies.values()}
    return result


def _copied_module(module: nn.Module, device: torch.device) -> nn.Module:
    """Copy a network directly to a device: a first copy on the device of the network could exceed its memory."""
    memo: dict[int, object] = {}  # deepcopy takes the copies of these tensors from it, so that shared ones stay shared
    for each in (*module.parameters(), *module.buffers()):
        if id(each) not in memo and type(each) in (Tensor, nn.Parameter):
            copied_tensor = each.detach().to(device, copy=True)
            is_parameter = type(each) is nn.Parameter
            memo[id(each)] = nn.Parameter(copied_tensor, each.requires_grad) if is_parameter else copied_tensor
    return copy.deepcopy(module, memo).to(device)  # `to` moves tensors of other types
