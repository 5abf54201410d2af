"""Blocks that return a tuple are layers like blocks that return a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from camserve_server.models.activations import activation_of, with_activation
from camserve_server.models.model import Model
from camserve_server.models.servable import unsupported_reason
from camserve_server.registry import METHODS
from tests.support import as_model, call, explained, noise


class Output(NamedTuple):
    """Output of a block with names."""

    hidden: Tensor
    attentions: None = None


class Block(nn.Module):
    """Convolution on maps [N, C, H, W], or on tokens [N, H·W, C] as in a transformer."""

    def __init__(self, channels: int, out: int, pack: Callable[[Tensor], Any], tokens: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1, stride=1 if tokens else 2)
        self.pack, self.tokens = pack, tokens

    def forward(self, x: Tensor) -> Any:
        """Return the activation in the form that `pack` gives it."""
        maps = x.transpose(1, 2).reshape(len(x), -1, 8, 8) if self.tokens else x
        y = self.conv(maps).relu()
        return self.pack(y.flatten(2).transpose(1, 2) if self.tokens else y)


class Net(nn.Module):
    """Two blocks with a linear head."""

    def __init__(self, pack: Callable[[Tensor], Any], tokens: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 4, stride=4) if tokens else nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([Block(6, 8, pack, tokens), Block(8, 10, pack, tokens)])
        self.head = nn.Linear(10, 5)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, 5]."""
        x = self.stem(x)
        x = x.flatten(2).transpose(1, 2) if self.tokens else x
        for block in self.blocks:
            output = block(x)
            x = output[0] if isinstance(output, tuple) else output
        logits: Tensor = self.head(x.mean(1) if self.tokens else x.mean((2, 3)))
        return logits


PACKS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, None),
    "tuple of one": lambda y: (y,),
    "tuple with another tensor": lambda y: (y, y.mean(1)),
    "named tuple": Output,
}
BLOCKS = ["blocks.0", "blocks.1"]


def model(pack: Callable[[Tensor], Any], tokens: bool) -> Model:
    return as_model(Net(pack, tokens))


@pytest.mark.parametrize("tokens", [False, True], ids=["maps", "tokens"])
@pytest.mark.parametrize("pack", PACKS)
def test_layers_are_those_of_a_network_with_tensors(pack: str, tokens: bool) -> None:
    packed, plain = model(PACKS[pack], tokens), model(lambda y: y, tokens)
    assert packed.layer == plain.layer
    assert packed.layer is not None
    assert packed.layer.name == BLOCKS[-1]
    assert packed.layers == plain.layers
    assert packed.spatial == plain.spatial
    assert {method: unsupported_reason(METHODS[method], packed) for method in METHODS} == {
        method: unsupported_reason(METHODS[method], plain) for method in METHODS
    }


@pytest.mark.parametrize("tokens", [False, True], ids=["maps", "tokens"])
@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.layers != "none"])
def test_maps_are_those_of_a_network_with_tensors(method: str, tokens: bool) -> None:
    packed, plain = model(PACKS["tuple"], tokens), model(lambda y: y, tokens)
    if unsupported_reason(METHODS[method], plain):
        pytest.skip("the method does not support this network")
    layers = BLOCKS if METHODS[method].layers == "many" else BLOCKS[1:]
    x = noise(3, 32, 32)
    maps = [explained(each, x, call(each, method, layers), [0, 2]).maps for each in (packed, plain)]
    assert maps[1].std() > 0
    assert torch.equal(*maps)


def test_branches_in_a_list_are_not_an_activation() -> None:
    x = noise(1, 2, 3, 3)
    assert activation_of([x, x]) is None
    assert activation_of(()) is None
    assert activation_of((None, x)) is None
    assert activation_of((x, None)) is x


@pytest.mark.parametrize("output", [noise(2), (noise(2), 5), Output(noise(2))])
def test_other_elements_of_the_output_are_kept(output: Any) -> None:
    new = torch.zeros(2)
    changed = with_activation(output, new)
    assert type(changed) is type(output)
    assert activation_of(changed) is new
    if isinstance(output, tuple):
        assert changed[1:] == output[1:]
