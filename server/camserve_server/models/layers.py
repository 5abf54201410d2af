"""Layers of a network and the layout of their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Form = Literal["NCHW", "NHWC", "tokens"]
Grid = tuple[int, int]  # (h, w)


@dataclass(frozen=True)
class Layer:
    """Output of one call of a module, as `channels` maps of `height` × `width` positions.

    Attributes:
        name: Name of the module. If the module runs several times in one forward pass, "NAME#n" is its n-th call,
            counted from 1.
        channels: Number of channels K.
        height: Number of rows h of the grid.
        width: Number of columns w of the grid.
        signed: True if a negative value has been observed.
        form: Layout of the output: [N, K, h, w] ("NCHW"), [N, h, w, K] ("NHWC") or [N, L, K] ("tokens") with
            L ≥ prefix + h·w.
        prefix: Number of tokens before those of the grid, such as a class token. Further tokens may follow the grid.
        batch_dim: Dimension of the batch: 0, or 1 for tokens [L, N, K]. The other attributes describe the output with
            the batch in front, as the engine's hooks pass it on.
        read_only: True if hooks can read the output, but the network does not go on with one that replaces it.
        cut: Cut value: 0 if all information in the logits passes through the layer, 1 if none does; see
            `cuts.CutMeter`. None if it has not been measured, or if the logits do not depend on the image.
    """

    name: str
    channels: int
    height: int
    width: int
    signed: bool = False
    form: Form = "NCHW"
    prefix: int = 0
    batch_dim: int = 0
    read_only: bool = False
    cut: float | None = None

    @property
    def module(self) -> str:
        """Name of the module, without the number of the call."""
        return self.name.partition("#")[0]

    @property
    def call(self) -> int:
        """Number of the call of the module in a forward pass, from 1."""
        return int(self.name.partition("#")[2] or 1)

    @property
    def positions(self) -> int:
        """Number of positions h·w."""
        return self.height * self.width

    def grid(self, output: Tensor) -> Tensor:
        """Return the module's output [N, …] as maps [N, K, h, w]: a differentiable view."""
        match self.form:
            case "NCHW":
                return output
            case "NHWC":
                return output.permute(0, 3, 1, 2)
            case "tokens":
                tokens = output[:, self.prefix : self.prefix + self.positions]
                return tokens.transpose(1, 2).view(-1, self.channels, self.height, self.width)


class ReadOnlyOutput(nn.Module):
    """Module that passes on an activation which another process has computed, so that hooks can read it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


@dataclass(frozen=True)
class GapHead:
    """Linear head behind global average pooling: the logits are a linear function of a layer's mean over positions.

    Attributes:
        layer: Layer whose mean is taken.
        module: Name of the linear module that computes the logits.
    """

    layer: Layer
    module: str

    def weight(self, network: nn.Module) -> Tensor:
        """Return the weights [classes, K], without the bias.

        Weights of a parametrisation, such as `weight_norm`, are computed at each access, so they cannot be stored.

        Args:
            network: Network, or a copy of it with other weights.
        """
        head = network.get_submodule(self.module)
        assert isinstance(head.weight, Tensor), "the probe found a linear module"
        return head.weight.detach().flatten(1)


def modules_with_hooks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that hooks can be registered on, with their names. TorchScript does not run hooks."""
    return ((name, each) for name, each in module.named_modules() if not isinstance(each, torch.jit.ScriptModule))


def module_aliases(module: nn.Module) -> dict[str, str]:
    """Return the further names of modules that are registered several times, with the name that their layers have."""
    first: dict[nn.Module, str] = {}
    names = [(name, each, first.setdefault(each, name)) for name, each in module.named_modules(remove_duplicate=False)]
    return {name: chosen for name, _, chosen in names if name != chosen}


def has_aspect(grid: Grid, size: Sequence[int]) -> bool:
    """Return True if the aspect ratio of a grid is that of the image, up to one row and one column.

    Args:
        grid: (h, w).
        size: Size (H, W) of the image.
    """
    (h, w), (H, W) = grid, size
    return (h - 1) * W <= (w + 1) * H and (w - 1) * H <= (h + 1) * W


def find_layer(name: str, spatial: Mapping[str, Layer], aliases: Mapping[str, str]) -> Layer | None:
    """Return the layer of a name, or None.

    Args:
        name: Name of a layer. "NAME#1" also names a module that runs once.
        spatial: Layers by name.
        aliases: Further names of modules (`module_aliases`).
    """
    module, mark, call = name.partition("#")
    name = aliases.get(module, module) + mark + call
    return spatial.get(name) or spatial.get(name.removesuffix("#1"))


def calls_of(name: str, spatial: Mapping[str, Layer]) -> list[str]:
    """Return the layer names of the calls of a module that runs several times.

    Args:
        name: Name of the module.
        spatial: Layers by name.
    """
    return [layer.name for layer in spatial.values() if layer.module == name and layer.name != name]
