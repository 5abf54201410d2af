"""Copies of a model on further devices."""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch import nn

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
            modules[each.module] = copy.deepcopy(each.module).to(device)
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
