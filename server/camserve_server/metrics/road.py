"""ROAD: A Consistent and Efficient Evaluation Strategy for Attribution Methods.

Rong, Leemann, Borisov, Kasneci, Kasneci 2022, arXiv:2202.00449.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from camserve_server.plan import Image, MetricResult, Plan, Score, Targets
from camserve_server.registry import Range, Sizes, metric
from camserve_server.rows import normal

NEAR, DIAGONAL = 1 / 6, 1 / 12  # what a neighbour weighs (section 4)
PRECISE = 1e-5  # of the imputed values, relative; the noise is far larger


@dataclass(frozen=True, eq=False)
class Imputed:
    """Row i is the image without the pixels of `missing[i]` [H, W], filled in from their surroundings, with noise."""

    x: Image
    missing: Sequence[Tensor]
    sigma: float
    seed: int

    def __len__(self) -> int:
        return len(self.missing)

    def make(self, start: int, stop: int) -> Tensor:
        return torch.stack([self._row(i) for i in range(start, stop)])

    def _row(self, i: int) -> Tensor:
        x, missing = self.x.tensor, self.missing[i]
        noise = self.sigma * normal(x.shape, self.seed, i).to(x)
        return torch.where(missing, imputed(x, missing) + noise, x)


def _rows(sizes: Sizes, *, steps: int = 9, **_: object) -> int:
    return 2 * steps


@metric("road", title="ROAD", paper="arXiv:2202.00449", rows=_rows, higher_is_better=True)
def road(
    x: Image,
    c: Targets,
    S: Tensor,
    *,
    steps: Annotated[int, Range(1, 100), "shares of the pixels that are taken out: 9 are 10 %, 20 % … 90 %"] = 9,
    sigma: Annotated[float, Range(0, 100), "standard deviation of the noise on what is filled in"] = 0.01,
    seed: int,
) -> Plan[MetricResult]:
    """How much more the probability falls without the most salient pixels than without the least, in [−½, ½].

    x [3, H, W], one class, S [H, W] in [0, 1]. Half of p_c(without the least) − p_c(without the most), mean over the
    shares taken out. What is missing is the weighted mean of its eight neighbours, known or missing themselves.
    """
    order = S.flatten().argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    counts = [round(len(order) * i / (steps + 1)) for i in range(1, steps + 1)]
    rank = place.view(S.shape)
    missing = [rank < count for count in counts] + [rank >= len(order) - count for count in counts]
    scores = yield from Score(Imputed(x, missing, sigma, seed), c)
    most, least = scores.probabilities[:steps, 0], scores.probabilities[steps:, 0]
    return MetricResult(float((least - most).mean() / 2), tuple(((least - most) / 2).tolist()))


def imputed(x: Tensor, missing: Tensor) -> Tensor:
    """x [C, H, W] with the pixels of `missing` [H, W] solved for: each is the weighted mean of its neighbours.

    By conjugate gradients: with the known pixels held, the weights are symmetric and the system is definite.
    """
    if bool(missing.all()):
        return torch.zeros_like(x)
    open_ = missing.to(x.dtype)

    def around(values: Tensor) -> Tensor:
        # Sums of shifted images take a quarter of the time of a convolution, and there are hundreds in a row.
        padded = F.pad(values, (1, 1, 1, 1))
        rows, others = padded[:, 1:-1], padded[:, :-2] + padded[:, 2:]
        near = rows[..., :-2] + rows[..., 2:] + others[..., 1:-1]
        return NEAR * near + DIAGONAL * (others[..., :-2] + others[..., 2:])

    weight = around(torch.ones_like(x[:1]))  # less at the border, where neighbours are missing for good

    def apply(values: Tensor) -> Tensor:
        return open_ * (weight * values - around(values))

    known = x * ~missing
    solved = open_ * (known.sum(dim=(1, 2), keepdim=True) / (~missing).sum())  # begin with the mean of what is known
    r = open_ * around(known) - apply(solved)
    enough = PRECISE**2 * (open_ * around(known)).square().sum()
    p, rr = r, r.square().sum()
    for _ in range(x.shape[-1] * x.shape[-2]):
        if not rr > enough:  # or not finite: no step would mend that
            break
        Ap = apply(p)
        step = rr / (p * Ap).sum()
        solved, r = solved + step * p, r - step * Ap
        rr, before = r.square().sum(), rr
        p = r + rr / before * p
    return known + solved
