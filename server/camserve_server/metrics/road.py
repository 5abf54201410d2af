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

NEAR, DIAGONAL = 1 / 6, 1 / 12  # Weights of the neighbours (section 4).
PRECISE = 1e-5  # Relative error of imputed values. The noise is far larger.


@dataclass(frozen=True, eq=False)
class Imputed:
    """Images with imputed pixels: in row i, the pixels of `missing[i]` are imputed from their neighbours, with noise.

    Attributes:
        x: The image.
        missing: Missing pixels [H, W] of each row, bool.
        sigma: Standard deviation of the noise, in units of the normalised image.
        seed: Seed of the noise.
    """

    x: Image
    missing: Sequence[Tensor]
    sigma: float
    seed: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.missing)

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) [n, 3, H, W]."""
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
    steps: Annotated[int, Range(1, 100)] = 9,
    sigma: Annotated[float, Range(0, 100)] = 0.01,
    seed: int,
) -> Plan[MetricResult]:
    """Difference of the falls of the probability without the most and without the least salient pixels, in [−½, ½].

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        steps: Number of shares of the pixels to remove: 9 stands for 10 %, 20 % … 90 %.
        sigma: Standard deviation of the noise on imputed pixels, in units of the normalised image.
        seed: Seed of the noise.

    Returns:
        Half of p_c(without the least salient) − p_c(without the most salient), averaged over the shares, in [−½, ½].
        The curve has one value per share. Missing pixels are the weighted means of their eight neighbours, which may be
        missing themselves.
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
    """Impute missing pixels so that each one is the weighted mean of its neighbours (section 4).

    The function uses conjugate gradients: for fixed known pixels, the system is symmetric and positive definite.

    Args:
        x: Image [C, H, W].
        missing: Missing pixels [H, W], bool.

    Returns:
        The image [C, H, W]. If all pixels are missing, it is zero.
    """
    if bool(missing.all()):
        return torch.zeros_like(x)
    open_ = missing.to(x.dtype)

    def around(values: Tensor) -> Tensor:
        # Sums of shifted images take a quarter of the time of a convolution, which runs hundreds of times.
        padded = F.pad(values, (1, 1, 1, 1))
        rows, others = padded[:, 1:-1], padded[:, :-2] + padded[:, 2:]
        near = rows[..., :-2] + rows[..., 2:] + others[..., 1:-1]
        return NEAR * near + DIAGONAL * (others[..., :-2] + others[..., 2:])

    weight = around(torch.ones_like(x[:1]))  # Pixels at the border have fewer neighbours.

    def apply(values: Tensor) -> Tensor:
        return open_ * (weight * values - around(values))

    known = x * ~missing
    solved = open_ * (known.sum(dim=(1, 2), keepdim=True) / (~missing).sum())  # Start with the mean.
    r = open_ * around(known) - apply(solved)
    enough = PRECISE**2 * (open_ * around(known)).square().sum()
    p, rr = r, r.square().sum()
    for _ in range(x.shape[-1] * x.shape[-2]):
        if not rr > enough:  # Converged, or not finite.
            break
        Ap = apply(p)
        step = rr / (p * Ap).sum()
        solved, r = solved + step * p, r - step * Ap
        rr, before = r.square().sum(), rr
        p = r + rr / before * p
    return known + solved
