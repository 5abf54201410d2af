"""RISE: Randomized Input Sampling for Explanation of Black-box Models.

Petsiuk, Das, Saenko 2018, arXiv:1806.07421.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from camserve_server.plan import Image, Plan, SaliencyMaps, Score, Scores, Sum, Targets
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import generator, resize


@dataclass(frozen=True, eq=False)
class Revealed:
    """Row i is x ⊙ M_i: a grid of cells shown or hidden, grown a little larger than the image, cut out at a shift.

    Each mask is drawn from the seed and its number, whenever it is asked for; those of the last rows made are kept.
    """

    x: Image
    count: int
    cells: int
    keep: float
    seed: int
    last: dict[int, Tensor] = field(default_factory=dict)  # masks [n, H, W] by the number of the first

    def __len__(self) -> int:
        return self.count

    def draw(self, i: int) -> tuple[Tensor, tuple[int, int]]:
        """The i-th grid [cells, cells] of zeros and ones, and its shift (y, x) in pixels, less than a cell."""
        chance = generator(self.seed, i)
        grid = torch.rand(self.cells, self.cells, generator=chance) < self.keep
        y, x = (int(torch.randint(side, (), generator=chance)) for side in self.cell)
        return grid, (y, x)

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width of a cell in pixels."""
        height, width = self.x.size
        return math.ceil(height / self.cells), math.ceil(width / self.cells)

    def masks(self, start: int, stop: int) -> Tensor:
        """[n, H, W] in [0, 1]."""
        for first, kept in self.last.items():
            if first <= start and stop <= first + len(kept):
                return kept[start - first : stop - first]
        grids, shifts = zip(*(self.draw(i) for i in range(start, stop)), strict=True)
        (H, W), (h, w) = self.x.size, self.cell
        large = resize(torch.stack(grids).to(self.x.tensor), ((self.cells + 1) * h, (self.cells + 1) * w))
        return torch.stack([mask[y : y + H, x : x + W] for mask, (y, x) in zip(large, shifts, strict=True)])

    def make(self, start: int, stop: int) -> Tensor:
        masks = self.masks(start, stop)
        self.last.clear()
        self.last[start] = masks
        return self.x.tensor * masks.unsqueeze(1)


def _rows(sizes: Sizes, *, masks: int = 6000, **_: object) -> int:
    return masks


@method("rise", title="RISE", paper="arXiv:1806.07421", rows=_rows, min_rows=lambda sizes, **_: 1)
def rise(
    x: Image,
    c: Targets,
    *,
    masks: Annotated[int, Range(1, 1_000_000), "random masks"] = 6000,
    cells: Annotated[int, Range(1, 256), "cells on each side of a mask"] = 8,
    keep: Annotated[float, Range(0.001, 1), "probability that a cell is shown; RISE's own paper takes 0.5"] = 0.1,
    seed: int,
) -> Plan[SaliencyMaps]:
    """The mean of random masks, weighted by the class's probability under each: thousands of forward passes.

    x [3, H, W], c [T] class indices → maps [T, H, W], unitless, ≥ 0.

    Equations:
        S = Σ_i p_c(x ⊙ M_i) M_i / (N keep)                         (eq. 6)

    Advice:
        Take it where the network is a black box and time is no matter. Fewer masks leave clouds that mean nothing. The
        scale of what it can show is that of a cell.
    """
    revealed = Revealed(x, masks, cells, keep, seed)

    def term(i: int, answer: Scores) -> Tensor:
        return answer.probabilities[0].to(x.tensor)[:, None, None] * revealed.masks(i, i + 1)

    summed = yield from Sum(Score(revealed, c, min_rows=1), term)
    done = int(summed.counts)
    return SaliencyMaps(summed.total[0] / (done * keep), share=done / masks)  # eq. 6
