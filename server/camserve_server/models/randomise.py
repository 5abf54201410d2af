"""A copy of a network in which some layers are random. The served network is read, and never written to."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from camserve_server.models.model import Model
from camserve_server.rows import normal


class RandomCopy:
    """`model` is a copy of the `served` one, as large in memory; what is random in it can be changed at any time.

    A weight tensor becomes random by being drawn anew, each value from a normal distribution with the mean and the
    standard deviation of those that it replaces. So activations keep their scale, in whatever layer, whether batch norm
    is folded into it or not: initialised anew, fifty layers without a batch norm that fits them would leave next to
    nothing of the input. Statistics of a batch norm that is not folded stay, as they hold a scale and nothing else.
    """

    def __init__(self, served: Model) -> None:
        module = copy.deepcopy(served.module)
        self.model = served.with_module(module)
        self._served = served
        self._seeds: dict[str, int] = {}  # of the layers that are random

    @torch.no_grad()
    def randomise(self, layers: Collection[str], seed: int) -> None:
        """Makes these layers random, and all others those of the served network.

        The same seed gives a layer the same weights, whichever others are random beside it.
        """
        wanted = dict.fromkeys(layers, seed)
        served = dict(self._served.module.named_parameters())
        for i, (name, weight) in enumerate(self.model.module.named_parameters()):
            layer = _layer(name)
            if self._seeds.get(layer) == wanted.get(layer):
                continue
            if layer in wanted:
                std, mean = torch.std_mean(served[name], correction=0)
                weight.copy_(normal(weight.shape, seed, i)).mul_(std).add_(mean)
            else:
                weight.copy_(served[name])
        self._seeds = wanted


@torch.no_grad()
def weighted_layers(model: Model) -> tuple[str, ...]:
    """The names of the layers that have weights of their own, in the order in which they first run.

    One that never runs as a module, such as the last projection of torch's attention, comes where the module runs that
    holds it. A weight that belongs to the whole network, such as a class token, is a layer of its own name.
    """
    entered: dict[str, int] = {}
    handles = []
    for name, module in model.module.named_modules():

        def enter(module: nn.Module, args: object, name: str = name) -> None:
            entered.setdefault(name, len(entered))

        handles.append(module.register_forward_pre_hook(enter))
    channels, size = model.preprocessing.channels, model.preprocessing.size
    try:
        model.module(torch.zeros(1, channels, *size, dtype=model.compute_dtype, device=model.device))
    finally:
        for handle in handles:
            handle.remove()

    def runs(layer: str) -> int:
        while layer not in entered:
            layer = layer.rpartition(".")[0]
        return entered[layer]

    layers = dict.fromkeys(_layer(name) for name, _ in model.module.named_parameters())
    return tuple(sorted(layers, key=runs))  # those that begin together stay in the order of their definition


def _layer(parameter: str) -> str:
    """The module that the parameter belongs to; the parameter itself if that is the whole network."""
    return parameter.rpartition(".")[0] or parameter
