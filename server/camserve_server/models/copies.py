"""Copies of a model on further devices."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
            modules[each.module] = _copied_module(each.module, each.device, device)
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


def _copied_module(module: nn.Module, source: torch.device, device: torch.device) -> nn.Module:
    """Copy a network from its device directly to another: a first copy on its own device could exceed the memory."""
    memo: dict[int, object] = {}  # deepcopy takes the copies of these tensors from it, so that shared ones stay shared
    for each in (*module.parameters(), *module.buffers()):
        if id(each) not in memo and type(each) in (Tensor, nn.Parameter):
            copied_tensor = each.detach().to(device, copy=True)
            is_parameter = type(each) is nn.Parameter
            memo[id(each)] = nn.Parameter(copied_tensor, each.requires_grad) if is_parameter else copied_tensor
    with _OtherTensors(source, device):
        copied_module = copy.deepcopy(module, memo)
    return copied_module.to(device)  # `to` moves tensors of other types


class _OtherTensors(TorchFunctionMode):
    """Lets deepcopy copy tensors from one device to another that are neither parameters nor buffers.

    Code of networks may keep such tensors from its first run, for example a grid of positions.

    Args:
        source: Device of the network. Tensors on other devices stay where they are.
        device: Device of the copies.
    """

    def __init__(self, source: torch.device, device: torch.device) -> None:
        super().__init__()
        self._source, self._device = source, device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not Tensor.__deepcopy__ or type(args[0]) is not Tensor or args[0].device != self._source:
            return func(*args, **(kwargs or {}))
        tensor: Tensor = args[0]
        return tensor.detach().to(self._device, copy=True).requires_grad_(tensor.requires_grad)
