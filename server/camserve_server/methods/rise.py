"""RISE: Randomized Input Sampling for Explanation of Black-box Models.

Petsiuk, Das, Saenko 2018, arXiv:1806.07421.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from camserve_server.plan import Image, MapWarning, Plan, Report, SaliencyMaps, Score, Scores, Sum, Targets
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import generator, resize

SAMPLE = 10_000  # number of masks whose probabilities are kept


@dataclass(frozen=True, eq=False)
class Revealed:
    """Randomly masked images: row i is x ⊙ M_i.

    M_i is a random grid of cells, 0 or 1, that is resized to slightly more than the size of the image and cropped at a
    random shift. A mask depends only on the seed and its index, so it can be drawn again at any time.

    Attributes:
        x: The image.
        count: Number of masks.
        cells: Number of cells on each side of a mask.
        keep: Probability that a cell is 1.
        seed: Seed of the masks.
        last: Masks [n, H, W] of the last rows made, by the index of the first one.
    """

    x: Image
    count: int
    cells: int
    keep: float
    seed: int
    last: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.count

    def draw(self, i: int) -> tuple[Tensor, tuple[int, int]]:
        """Draw a grid and its shift.

        Args:
            i: Index of the mask.

        Returns:
            The grid [cells, cells], bool, and the shift (y, x) in pixels, smaller than a cell.
        """
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
        """Return masks [start, stop) [n, H, W] in [0, 1]."""
        for first, kept in self.last.items():
            if first <= start and stop <= first + len(kept):
                return kept[start - first : stop - first]
        grids, shifts = zip(*(self.draw(i) for i in range(start, stop)), strict=True)
        (H, W), (h, w) = self.x.size, self.cell
        large = resize(torch.stack(grids).to(self.x.tensor), ((self.cells + 1) * h, (self.cells + 1) * w))
        return torch.stack([mask[y : y + H, x : x + W] for mask, (y, x) in zip(large, shifts, strict=True)])

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) [n, 3, H, W]."""
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
    masks: Annotated[int, Range(1, 1_000_000)] = 6000,
    cells: Annotated[int, Range(1, 256)] = 8,
    keep: Annotated[float, Range(0.001, 1)] = 0.1,
    seed: int,
) -> Plan[SaliencyMaps]:
    """Mean of random masks, weighted by the probability of the class under each mask: thousands of forward passes.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        masks: Number of random masks N.
        cells: Number of cells on each side of a mask.
        keep: Probability that a cell is shown. The RISE paper uses 0.5.
        seed: Seed of the masks.

    Returns:
        Maps [T, H, W], unitless, ≥ 0.

    Equations:
        S = Σ_i p_c(x ⊙ M_i) M_i / (N keep)                         (eq. 6)

    Advice:
        Use it if the network is a black box and time does not matter. With fewer masks, the map shows random patches
        without meaning. It cannot show details that are smaller than a cell. If the masks hardly change the
        probability, for example because it is always nearly 1, the map shows only the masks and gets a warning.
    """
    revealed = Revealed(x, masks, cells, keep, seed)
    p = torch.zeros(min(masks, SAMPLE), len(c), dtype=torch.float64, device=c.p.device)

    def term(i: int, answer: Scores) -> Tensor:
        if i < len(p):
            p[i] = answer.probabilities[0]
        return answer.probabilities[0].to(x.tensor)[:, None, None] * revealed.masks(i, i + 1)

    summed = yield from Sum(Score(revealed, c, min_rows=1), term)
    done = int(summed.counts)
    yield from _warn_if_independent_of_masks(c, p[:done], done)
    return SaliencyMaps(summed.total[0] / (done * keep), share=done / masks)  # eq. 6


def _warn_if_independent_of_masks(c: Targets, p: Tensor, masks: int) -> Plan[None]:
    """Report each class whose map must consist of the chance variation of the masks.

    By the Cauchy–Schwarz inequality, no pixel's covariance with the probability is larger than the product of the
    standard deviations. Below σ(p) / mean(p) = 1 / √N, it is smaller than the chance variation of the mean mask.

    Args:
        c: T target classes.
        p: Probabilities [n, T] under the first masks, float64.
        masks: Number N of all masks.
    """
    spread, mean = p.std(dim=0, correction=0), p.mean(dim=0)
    for index, relative in zip(c.index, (spread / mean).tolist(), strict=True):
        if relative < masks**-0.5:
            what = "random mask" if masks == 1 else f"{masks:,} random masks"
            yield from Report(
                MapWarning(
                    f"degenerate: the map of class {index} shows the {what}, because the "
                    "probability varies too little for this number of masks: its standard deviation is "
                    f"{relative:.1g} of its mean"
                )
            )
