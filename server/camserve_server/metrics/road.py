"""ROAD: A Consistent and Efficient Evaluation Strategy for Attribution Methods.

Rong, Leemann, Borisov, Kasneci, Kasneci 2022, arXiv:2202.00449.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from camserve_server.plan import Image, MetricResult, OnHost, Plan, Score, Targets
from camserve_server.registry import Range, Sizes, metric
from camserve_server.rows import normal

PRECISE = 1e-5  # Relative error of imputed values. The noise is far larger.
CHUNK = 16  # Images that exist at a time. More of them would take memory while the request waits for its batches.


@dataclass(frozen=True, eq=False)
class Images:
    """Rows that exist as pixels.

    Attributes:
        x: The original image.
        images: Images [3, H, W] on the host.
    """

    x: Image
    images: Sequence[Tensor]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.images)

    def make(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) [n, 3, H, W]."""
        return torch.stack([*self.images[start:stop]]).to(self.x.tensor.device)


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
    probabilities: list[Tensor] = []
    for start in range(0, len(missing), CHUNK):
        images = []
        for i, pixels in enumerate(missing[start : start + CHUNK], start):
            images.append((yield from OnHost(partial(_without, pixels, x.tensor, sigma, seed, i))))
        scores = yield from Score(Images(x, images), c)
        probabilities.append(scores.probabilities[:, 0])
    together = torch.cat(probabilities)
    most, least = together[:steps], together[steps:]
    return MetricResult(float((least - most).mean() / 2), tuple(((least - most) / 2).tolist()))


def _without(missing: Tensor, x: Tensor, sigma: float, seed: int, i: int) -> Tensor:
    """Impute the missing pixels [H, W] of an image [3, H, W] and add noise to them.

    The function takes about 100 ms for 224×224 pixels.
    """
    missing, x = missing.cpu(), x.cpu()
    noise = sigma * normal(x.shape, seed, i).to(x)
    return torch.where(missing, imputed(x, missing) + noise, x)


def imputed(x: Tensor, missing: Tensor) -> Tensor:
    """Impute missing pixels so that each one is the weighted mean of its neighbours (section 4).

    The four nearest neighbours have the weight 1/6, the diagonal ones 1/12. The function uses conjugate gradients: for
    fixed known pixels, the system is symmetric and positive definite.

    Args:
        x: Image [C, H, W] on the host.
        missing: Missing pixels [H, W], bool.

    Returns:
        The image [C, H, W]. If all pixels are missing, it is zero.
    """
    if bool(missing.all()):
        return torch.zeros_like(x)
    known = x * ~missing
    mean = known.sum(dim=(1, 2), keepdim=True) / (~missing).sum()
    solved = _flat(missing * mean)
    # 12 · (weight of the neighbours · value − weighted sum of the neighbours) = binomial(1) · value − binomial(values),
    # because the centre of the kernel cancels out. Pixels at the border have fewer neighbours.
    binomial = _Binomial(len(solved), x)
    inner = binomial.inner
    open_ = _flat(missing.expand_as(x).to(x.dtype))[inner]
    weight = open_ * binomial(_flat(torch.ones_like(x)))
    b = open_ * binomial(_flat(known))
    s, Ap = solved[inner], torch.empty_like(b)

    def apply(values: Tensor) -> None:
        torch.mul(weight, values[inner], out=Ap)
        Ap.addcmul_(open_, binomial(values), value=-1)

    apply(solved)
    r, direction = b - Ap, torch.zeros_like(solved)
    p = direction[inner]
    p.copy_(r)
    enough = PRECISE**2 * _dot(b, b)
    rr = _dot(r, r)
    for _ in range(x.shape[-1] * x.shape[-2]):
        if not rr > enough:  # Converged, or not finite.
            break
        apply(direction)
        pAp = _dot(p, Ap)
        if not pAp > 0:  # Not finite, or too small for the data type.
            break
        step = rr / pAp
        s.add_(p, alpha=step)
        r.sub_(Ap, alpha=step)
        rr, before = _dot(r, r), rr
        torch.add(r, p, alpha=rr / before, out=p)
    return known + solved.view(len(x), x.shape[1] + 2, x.shape[2] + 2)[:, 1:-1, 1:-1]


class _Binomial:
    """Sums over the 3×3 neighbours of each pixel with the weights (1 2 1; 2 4 2; 1 2 1), for flattened images.

    The weights are those of four sums of two values. Operations on whole contiguous buffers that are allocated once
    take a third of the time of operations on shifted images.

    Args:
        n: Number of values of a flattened image.
        x: Image [C, H, W], for its shape and data type.

    Attributes:
        inner: Values of the flattened image that the result belongs to. They include all pixels.
    """

    def __init__(self, n: int, x: Tensor) -> None:
        self._row = row = x.shape[2] + 2
        self._a, self._b = x.new_empty(n), x.new_empty(n)
        self.inner = slice(row + 1, n - row - 1)

    def __call__(self, values: Tensor) -> Tensor:
        """Return the sums [n − 2 · (W + 3)] for a flattened image [n]. The next call overwrites them."""
        a, b, n, row = self._a, self._b, len(values), self._row
        torch.add(values[:-1], values[1:], out=a[: n - 1])
        torch.add(a[: n - 2], a[1 : n - 1], out=b[: n - 2])
        torch.add(b[: n - 2 - row], b[row : n - 2], out=a[: n - 2 - row])
        return torch.add(a[: n - 2 - 2 * row], a[row : n - 2 - row], out=b[: n - 2 - 2 * row])


def _flat(x: Tensor) -> Tensor:
    """Surround each channel of an image [C, H, W] with zeros and flatten it to [C · (H + 2) · (W + 2)]."""
    return F.pad(x, (1, 1, 1, 1)).flatten()


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))
