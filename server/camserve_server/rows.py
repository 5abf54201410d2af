"""Rows as recipes: each class makes some of its rows when a batch needs them, on the model's device.

2,944 masked inputs of VGG16 are 1.8 GB as pixels and a few MB as activations. `make(start, stop)` gives the same bits
for every slice, because no class reduces across rows.
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

__all__ = [
    "Blended",
    "Masked",
    "Part",
    "Perturbed",
    "RepeatInterleaved",
    "Repeated",
    "generator",
    "minmax",
    "normal",
    "resize",
    "resize_minmax",
    "to_device",
]


def to_device(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Copy integers to a device without waiting for a GPU, as `torch.tensor(numbers, device=device)` would.

    Args:
        device: The device.
        numbers: n integers.

    Returns:
        The integers [n], int64.
    """
    tensor = torch.tensor(numbers, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps bilinearly: the up(·) of the papers, with `align_corners=False` and without antialias.

    Args:
        maps: Maps [..., h, w].
        size: Height and width (H, W) in pixels.

    Returns:
        Maps [..., H, W].
    """
    if maps.shape[-2:] == size:
        return maps
    if maps.is_cuda and maps.requires_grad:
        return resize_by_products(maps, size)
    # Each map is an image with one channel. As channels of one image, their number would change the bits.
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)


def resize_by_products(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps like `resize`, by products with matrices of weights.

    On a GPU, the gradient of `interpolate` adds in another order each time, and an ascent amplifies the difference.

    Args:
        maps: Maps [..., h, w].
        size: Height and width (H, W) in pixels.

    Returns:
        Maps [..., H, W].
    """

    def weights(short: int, long: int) -> Tensor:  # [long, short]
        eye = torch.eye(short, dtype=torch.float64, device=maps.device)  # float64 is never rounded to TF32
        return F.interpolate(eye[None, None], size=(long, short), mode="bilinear", align_corners=False)[0, 0]

    rows, columns = (weights(*each) for each in zip(maps.shape[-2:], size, strict=True))
    return (rows @ maps.double() @ columns.T).to(maps.dtype)


def minmax(maps: Tensor) -> Tensor:
    """Scale each map to [0, 1] by its minimum and maximum: the n(·) of the papers.

    Args:
        maps: Maps [..., h, w].

    Returns:
        Maps [..., h, w] in [0, 1]. A constant map becomes zeros.
    """
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return torch.where(span > 0, (maps - low) / span, torch.zeros_like(maps))


def resize_minmax(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps, then scale each one to [0, 1]: the n(up(·)) of the papers.

    Args:
        maps: Maps [..., h, w].
        size: Height and width (H, W) in pixels.

    Returns:
        Maps [..., H, W] in [0, 1]. A constant map becomes zeros.
    """
    # Detect constant maps before resizing, whose rounding would otherwise look like contrast.
    constant = maps.amin(dim=(-2, -1), keepdim=True) == maps.amax(dim=(-2, -1), keepdim=True)
    return torch.where(constant, 0.0, minmax(resize(maps, size)))


@dataclass(frozen=True, eq=False)
class Repeated:
    """The same image in every row.

    Attributes:
        x: The image.
        times: Number of rows.
    """

    x: Image
    times: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.times

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) [n, 3, H, W]."""
        return self.x.row.expand(stop - start, -1, -1, -1)


@dataclass(frozen=True, eq=False)
class RepeatInterleaved:
    """Other rows, each one several times in succession, for example once for each class to differentiate.

    Attributes:
        rows: The other rows.
        times: Number of repetitions of each row.
    """

    rows: Rows
    times: int

    def __len__(self) -> int:
        """Return the number of rows, repetitions included."""
        return self.times * len(self.rows)

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) [n, 3, H, W]."""
        first = start // self.times
        rows = self.rows.make(first, (stop + self.times - 1) // self.times).repeat_interleave(self.times, dim=0)
        return rows[start - first * self.times : stop - first * self.times]


@dataclass(frozen=True, eq=False)
class Perturbed:
    """The image with noise, scaled: row i is a_i · (x + σ ε_i).

    Attributes:
        x: The image x.
        scales: Factor a_i of each row.
        sigma: Standard deviation σ of the noise, in units of the normalised image.
        seed: Seed of the standard normal noise ε_i.
    """

    x: Image
    scales: Sequence[float]
    sigma: float
    seed: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.scales)

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) [n, 3, H, W]."""
        return torch.stack([self.scales[i] * self.noisy(i) for i in range(start, stop)])

    def noisy(self, i: int) -> Tensor:
        """Return the noisy image of row i before it is scaled.

        Args:
            i: Index of the row.

        Returns:
            x + σ ε_i, [3, H, W].
        """
        x = self.x.tensor
        return x if self.sigma == 0 else x + self.sigma * normal(x.shape, self.seed, i).to(x)


def normal(shape: Sequence[int], seed: int, *key: int) -> Tensor:
    """Draw standard normal noise that depends only on the shape, the seed and the key.

    Args:
        shape: Shape of the noise.
        seed: Seed of the request.
        *key: Integers that distinguish the draws of one request, such as the index of a row.

    Returns:
        The noise, float32, on the CPU.
    """
    return torch.randn(tuple(shape), generator=generator(seed, *key))


def generator(seed: int, *key: int) -> torch.Generator:
    """Return a new generator for a seed and a key. With one generator per row, rows can be made in any order.

    Args:
        seed: Seed of the request.
        *key: Integers that distinguish the generators of one request, such as the index of a row.

    Returns:
        The generator, on the CPU.
    """
    mixed = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


Part = Literal["revealed", "hidden"]
"""Part of the image that a mask M keeps: "revealed" is x ⊙ M, "hidden" is x ⊙ (1 − M)."""


@dataclass(frozen=True, eq=False)
class Masked:
    """The image under masks made of activations.

    Row k·P + i shows part `parts[i]` of the image under the mask of channel k, where P = len(parts).

    Attributes:
        x: The image.
        activations: Activations [K, h, w].
        mask: Function that makes masks [n, H, W] in [0, 1] of activations [n, h, w].
        parts: Parts of the image for each mask.
    """

    x: Image
    activations: Tensor
    mask: Resize = resize_minmax
    parts: Sequence[Part] = ("revealed",)

    def __len__(self) -> int:
        """Return the number of rows, K·P."""
        return len(self.parts) * len(self.activations)

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) [n, 3, H, W]."""
        P = len(self.parts)
        A = self.activations[start // P : (stop + P - 1) // P]
        M = self.mask(A, self.x.size)
        of_channel = torch.stack([M if part == "revealed" else 1 - M for part in self.parts], dim=1)
        first = start - start // P * P
        return self.x.tensor * of_channel.flatten(0, 1)[first : first + stop - start].unsqueeze(1)


@dataclass(frozen=True, eq=False)
class Blended:
    """Two inputs, mixed pixel by pixel: row i shows `over` where `rank` < `counts[i]`, and `under` elsewhere.

    Attributes:
        over: Input [3, H, W].
        under: Input [3, H, W].
        rank: Rank of each pixel [H, W].
        counts: Number of pixels of `over` in each row.
    """

    over: Tensor
    under: Tensor
    rank: Tensor
    counts: Sequence[int]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.counts)

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) [n, 3, H, W]."""
        counts = to_device(self.rank.device, self.counts[start:stop]).view(-1, 1, 1, 1)
        return torch.where(self.rank < counts, self.over, self.under)
