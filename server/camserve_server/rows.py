"""Rows are recipes, not pixels: each kind makes a few of its rows when a batch takes them, on the model's device.

2,944 masked inputs of VGG16 are 1.8 GB as pixels and a few MB as activations. Making rows [start, stop) gives the same
bits whatever the slice: nothing here reduces across rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from camserve_server.plan import Image, Resize, Rows


def to_device(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """[n] int64. A GPU goes on meanwhile, which it would not for `torch.tensor(numbers, device=device)`."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., h, w] → [..., H, W]: the ↑ of the papers, bilinear, `align_corners=False`, no antialias."""
    if maps.shape[-2:] == size:
        return maps
    # As images of one channel each: as channels of one image, their number would decide about the bits.
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)


def minmax(maps: Tensor) -> Tensor:
    """[..., h, w] → the same in [0, 1], map by map. A constant map becomes zeros."""
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / span, torch.zeros_like(maps))


def resize_minmax(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., h, w] → [..., H, W] in [0, 1]: the n(up(·)) of the papers.

    A constant map becomes zeros. It is told before it is resized: afterwards the rounding would look like contrast.
    """
    constant = maps.amin(dim=(-2, -1), keepdim=True) == maps.amax(dim=(-2, -1), keepdim=True)
    return torch.where(constant, 0.0, minmax(resize(maps, size)))


@dataclass(frozen=True, eq=False)
class Repeated:
    """The image itself, `times` times."""

    x: Image
    times: int

    def __len__(self) -> int:
        return self.times

    def make(self, start: int, stop: int) -> Tensor:
        return self.x.tensor.expand(stop - start, -1, -1, -1)


@dataclass(frozen=True, eq=False)
class RepeatInterleaved:
    """Every one of `rows`, `times` times in succession: one for each class that it is to be differentiated for."""

    rows: Rows
    times: int

    def __len__(self) -> int:
        return self.times * len(self.rows)

    def make(self, start: int, stop: int) -> Tensor:
        first = start // self.times
        rows = self.rows.make(first, (stop + self.times - 1) // self.times).repeat_interleave(self.times, dim=0)
        return rows[start - first * self.times : stop - first * self.times]


@dataclass(frozen=True, eq=False)
class Perturbed:
    """Row i is a_i · (x + σ ε_i), ε_i of normal noise: `scales` are the a_i, `sigma` is σ."""

    x: Image
    scales: Sequence[float]
    sigma: float
    seed: int

    def __len__(self) -> int:
        return len(self.scales)

    def make(self, start: int, stop: int) -> Tensor:
        return torch.stack([self.scales[i] * self.noisy(i) for i in range(start, stop)])

    def noisy(self, i: int) -> Tensor:
        """x + σ ε_i, [3, H, W]."""
        x = self.x.tensor
        return x if self.sigma == 0 else x + self.sigma * normal(x.shape, self.seed, i).to(x)


def normal(shape: Sequence[int], seed: int, *key: int) -> Tensor:
    """Standard normal noise, float32 on the CPU: the same for the same seed and key, whatever was drawn before."""
    return torch.randn(tuple(shape), generator=generator(seed, *key))


def generator(seed: int, *key: int) -> torch.Generator:
    """A generator of its own for each key, such as a row's index: rows can then be made in any order."""
    mixed = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


Part = Literal["revealed", "hidden"]


@dataclass(frozen=True, eq=False)
class Masked:
    """The image under masks made of `activations` [K, h, w]; `mask` makes [n, H, W] in [0, 1] of [n, h, w] of them.

    Row k·P + i is x ⊙ M_k where `parts[i]` is "revealed" and x ⊙ (1 − M_k) where it is "hidden", P = len(parts): the
    two share their mask.
    """

    x: Image
    activations: Tensor
    mask: Resize = resize_minmax
    parts: Sequence[Part] = ("revealed",)

    def __len__(self) -> int:
        return len(self.parts) * len(self.activations)

    def make(self, start: int, stop: int) -> Tensor:
        P = len(self.parts)
        A = self.activations[start // P : (stop + P - 1) // P]
        M = self.mask(A, self.x.size)
        of_channel = torch.stack([M if part == "revealed" else 1 - M for part in self.parts], dim=1)
        first = start - start // P * P
        return self.x.tensor * of_channel.flatten(0, 1)[first : first + stop - start].unsqueeze(1)


@dataclass(frozen=True, eq=False)
class Blended:
    """Two inputs [3, H, W], mixed pixel by pixel: `over` where `rank` [H, W] < `counts[i]`, `under` elsewhere."""

    over: Tensor
    under: Tensor
    rank: Tensor
    counts: Sequence[int]

    def __len__(self) -> int:
        return len(self.counts)

    def make(self, start: int, stop: int) -> Tensor:
        counts = to_device(self.rank.device, self.counts[start:stop]).view(-1, 1, 1, 1)
        return torch.where(self.rank < counts, self.over, self.under)
