"""The layers of a network that can be named, and what of them a plan sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Form = Literal["NCHW", "NHWC", "tokens"]
Grid = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One output of a module, seen as `channels` maps of `height` × `width` positions.

    `name` is the module's. Where the module runs several times in one pass, "name#n" is its n-th call, counted from 1.
    The output is [N, K, h, w] ("NCHW"), [N, h, w, K] ("NHWC") or [N, prefix + h·w, K] ("tokens"), where `prefix` is the
    number of tokens before those of the grid. `signed` is true where it has been seen to be negative.
    """

    name: str
    channels: int
    height: int
    width: int
    signed: bool = False
    form: Form = "NCHW"
    prefix: int = 0

    @property
    def module(self) -> str:
        """The name of the module, without the call."""
        return self.name.partition("#")[0]

    @property
    def call(self) -> int:
        """Which of the module's calls it is, from 1."""
        return int(self.name.partition("#")[2] or 1)

    @property
    def positions(self) -> int:
        """h·w."""
        return self.height * self.width

    def grid(self, output: Tensor) -> Tensor:
        """The module's output [N, …] → [N, K, h, w], a view, differentiable."""
        match self.form:
            case "NCHW":
                return output
            case "NHWC":
                return output.permute(0, 3, 1, 2)
            case "tokens":
                return output[:, self.prefix :].transpose(1, 2).view(-1, self.channels, self.height, self.width)


@dataclass(frozen=True, eq=False)
class GapHead:
    """Logits that are a linear function of a layer's mean over its positions: `weight` [classes, K], and a bias."""

    layer: Layer
    weight: Tensor


def find_layer(name: str, spatial: Mapping[str, Layer]) -> Layer | None:
    """The layer of that name; "name#1" is also that of a module that runs once."""
    return spatial.get(name) or spatial.get(name.removesuffix("#1"))


def calls_of(name: str, spatial: Mapping[str, Layer]) -> list[str]:
    """The names of the calls of a module that runs several times."""
    return [layer.name for layer in spatial.values() if layer.module == name and layer.name != name]
