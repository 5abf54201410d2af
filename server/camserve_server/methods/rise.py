"""RISE: Randomized Input Sampling for Explanation of Black-box Models.

Petsiuk, Das, Saenko 2018, arXiv:1806.07421.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from camserve_server.plan import Image, Plan, SaliencyMaps, Score, Scores, Sum, Targets
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import generator, up


@dataclass(frozen=True, eq=False)
class Revealed:
    """Row i is x ⊙ M_i: a grid of cells shown or hidden, grown a little larger than the image, cut out at a shift.

    Only the grids and the shifts are kept; a mask is made when it is asked for.
    """

    x: Image
    grids: Tensor  # [N, cells, cells], 0 or 1
    shifts: Tensor  # [N, 2]

    def __len__(self) -> int:
        return len(self.grids)

    def masks(self, start: int, stop: int) -> Tensor:
        """[n, H, W] in [0, 1]."""
        cells = self.grids.shape[-1]
        (H, W), (h, w) = self.x.size, self.cell(self.x.size, cells)
        large = up(self.grids[start:stop].to(self.x.tensor), ((cells + 1) * h, (cells + 1) * w))
        shifts = self.shifts[start:stop].tolist()
        return torch.stack([mask[y : y + H, x : x + W] for mask, (y, x) in zip(large, shifts, strict=True)])

    def make(self, start: int, stop: int) -> Tensor:
        return self.x.tensor * self.masks(start, stop).unsqueeze(1)

    @staticmethod
    def cell(size: tuple[int, int], cells: int) -> tuple[int, int]:
        """Height and width of a cell in pixels."""
        return math.ceil(size[0] / cells), math.ceil(size[1] / cells)


def _rows(sizes: Sizes, *, masks: int = 6000, **_: object) -> int:
    return masks


@method("rise", title="RISE", paper="arXiv:1806.07421", rows=_rows, least=lambda sizes, **_: 1)
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
    draw = generator(seed)
    grids = torch.rand(masks, cells, cells, generator=draw) < keep
    high = torch.tensor(Revealed.cell(x.size, cells))
    shifts = (torch.rand(masks, 2, generator=draw, dtype=torch.float64) * high).long()
    revealed = Revealed(x, grids.to(x.tensor.device), shifts)

    def term(i: int, answer: Scores) -> Tensor:
        return answer.probabilities[0].to(x.tensor)[:, None, None] * revealed.masks(i, i + 1)

    summed = yield from Sum(Score(revealed, c, least=1), term)
    done = int(summed.counts)
    return SaliencyMaps(summed.total[0] / (done * keep), share=done / masks)  # eq. 6
