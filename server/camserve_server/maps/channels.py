"""What methods have in common that mask the image by each channel of a layer and score it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Channels:
    """Which channels of a layer are to be run, and how their scores go back to all K of them.

    `run` [n] are their indices, the strongest (Σ|A|) first, so that a method that is cut short has had those that weigh
    most. Constant channels make the same mask, nothing at all: the first of `run` stands for them all.
    """

    run: Tensor
    strength: Tensor  # [K]
    alike: Tensor  # [K], true for constant channels

    def __len__(self) -> int:
        return len(self.run)

    def spread(self, values: Tensor, missing: float = 0.0) -> Tensor:
        """Values [m, T] of the first m that were run → [K, T]; `missing` for channels that none of them stands for."""
        spread = values.new_full((len(self.strength), values.shape[1]), missing)
        run = self.run[: len(values)]
        if len(run) and self.alike[run[0]]:
            spread[self.alike] = values[0]
        spread[run] = values
        return spread

    def together(self, A: Tensor) -> Tensor:
        """A [K, h, w] → [n, h, w], those that are run, each with all that it stands for added up."""
        found = A[self.run]
        if len(self.run) and self.alike[self.run[0]]:
            found[0] = A[self.alike].sum(dim=0)
        return found

    def share(self, done: int) -> float:
        """How much of Σ|A| the first `done` that were run stand for, in [0, 1]."""
        known = self.spread(torch.ones(done, 1, dtype=self.strength.dtype, device=self.strength.device))[:, 0]
        total = self.strength.sum()
        return float((known * self.strength).sum() / total) if total > 0 else 1.0


def channels(A: Tensor, *, dead: bool) -> Channels:
    """Those of A [K, h, w] that must be run; with `dead`, channels that are zero everywhere as well."""
    flat = A.flatten(1)
    strength = flat.abs().sum(dim=1, dtype=torch.float64)
    alike = flat.amin(dim=1) == flat.amax(dim=1)
    order = strength.argsort(descending=True, stable=True)
    different = order[~alike[order]]  # those that are not finite too, which the map is to show
    if not dead:
        alike &= strength > 0
    return Channels(torch.cat([alike.nonzero()[:1, 0], different]), strength, alike)
