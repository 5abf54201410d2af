"""Which layers a network has, and where a class activation map should look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """The output [N, channels, height, width] of a module that runs once a forward pass.

    `signed` is true where it has been seen to be negative: activations that Poly-CAM does not expect.
    """

    name: str
    channels: int
    height: int
    width: int
    signed: bool = False


@dataclass
class _Run:
    """One call of one module: its output, and what that looked like when the call ended."""

    name: str
    module: nn.Module
    output: Tensor
    negative: bool


def probe(module: nn.Module, example: Tensor) -> tuple[dict[str, Layer], tuple[Layer, ...], int]:
    """Runs `example` [1, 3, H, W] once. Returns all spatial layers, the default ones (fine to coarse) and the classes.

    The defaults are, at each resolution, the last non-negative output that no pooling has made: what the
    Poly-CAM paper calls the layers at a change of resolution. Of modules that share an output (a block and its last
    activation) the outermost gives its name. A module called several times has no single output to name.
    """
    runs: list[_Run] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                runs.append(_Run(name, module, output, bool((output < 0).any())))

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in module.named_modules() if name]
    try:
        with torch.no_grad():
            logits = module(example)
    finally:
        for handle in handles:
            handle.remove()

    calls = [run.name for run in runs]
    once = [run for run in runs if calls.count(run.name) == 1 and run.output.shape[-1] * run.output.shape[-2] > 1]
    spatial = {run.name: _layer(run) for run in once}
    pooled = {id(run.output) for run in runs if "Pool" in type(run.module).__name__}
    last: dict[tuple[int, int], Layer] = {}
    for run in once:
        if not run.negative and id(run.output) not in pooled:
            last[(run.output.shape[-2], run.output.shape[-1])] = _layer(run)
    layers = tuple(sorted(last.values(), key=lambda layer: -layer.height * layer.width))
    return spatial, layers, logits.shape[-1]


def _layer(run: _Run) -> Layer:
    _, channels, height, width = run.output.shape
    return Layer(run.name, channels, height, width, run.negative)
