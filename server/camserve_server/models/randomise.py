"""Copy of a network with random weights in chosen layers. The served network is only read."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from camserve_server.models.layers import modules_with_hooks
from camserve_server.models.model import Model
from camserve_server.rows import normal


class RandomCopy:
    """Copy of a model whose layers can be made random and restored. It takes as much memory as the served model.

    Each value of a random weight tensor is drawn from a normal distribution with the mean and standard deviation of the
    served tensor. Activations therefore keep their scale in every layer, whether or not batch norm is folded into it.
    After a new initialisation, fifty layers without a batch norm that fits them would reduce the input to almost
    nothing. The statistics of a batch norm that is not folded keep their values, because they hold only a scale.

    Attributes:
        model: The copy.
    """

    def __init__(self, served: Model) -> None:
        module = copy.deepcopy(served.module)
        self.model = served.with_module(module)
        self._served = served
        self._seeds: dict[str, int] = {}  # seed of each layer that is random

    @torch.no_grad()
    def randomise(self, layers: Collection[str], seed: int) -> None:
        """Make the given layers random and restore all others.

        Args:
            layers: Names of layers, as returned by `weighted_layers`.
            seed: Seed of the weights. The weights of a layer do not depend on which other layers are random.
        """
        seeds = dict.fromkeys(layers, seed)
        served = dict(self._served.module.named_parameters())
        for i, (name, weight) in enumerate(self.model.module.named_parameters()):
            layer = _layer(name)
            if self._seeds.get(layer) == seeds.get(layer):
                continue
            if layer in seeds:
                std, mean = torch.std_mean(served[name], correction=0)
                weight.copy_(normal(weight.shape, seed, i)).mul_(std).add_(mean)
            else:
                weight.copy_(served[name])
        self._seeds = seeds


@torch.no_grad()
def weighted_layers(model: Model) -> tuple[str, ...]:
    """Return the names of the layers that have weights of their own, in the order of their first run.

    A layer that never runs as a module, such as the output projection of torch.nn.MultiheadAttention, takes the place
    of the module that contains it. A weight that belongs to the whole network, such as a class token, counts as a layer
    of its own name.

    Args:
        model: Model whose network is run once on zeros.
    """
    layers = dict.fromkeys(_layer(name) for name, _ in model.module.named_parameters())
    if not layers:
        return ()
    entered: dict[str, int] = {}
    handles = []
    for name, module in modules_with_hooks(model.module):

        def enter(module: nn.Module, args: object, name: str = name) -> None:
            entered.setdefault(name, len(entered))

        handles.append(module.register_forward_pre_hook(enter))
    channels, size = model.preprocessing.channels, model.preprocessing.size
    try:
        model.module(torch.zeros(1, channels, *size, dtype=model.compute_dtype, device=model.device))
    finally:
        for handle in handles:
            handle.remove()

    def first_run(layer: str) -> int:
        while layer not in entered:
            layer = layer.rpartition(".")[0]
        return entered[layer]

    return tuple(sorted(layers, key=first_run))  # layers with the same place keep the order of their definition


def _layer(parameter: str) -> str:
    """Return the module that owns the parameter, or the parameter's own name if the network itself owns it."""
    return parameter.rpartition(".")[0] or parameter
