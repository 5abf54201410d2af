"""RISE: Randomized Input Sampling for Explanation of Black-box Models, the insertion and deletion metrics.

Petsiuk, Das, Saenko 2018, arXiv:1806.07421; as the Poly-CAM paper runs them (section 4.2.1, arXiv:2204.13359).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from camserve_server.errors import InvalidArgument
from camserve_server.plan import Cached, Image, MetricResult, Plan, Score, Targets
from camserve_server.registry import Range, Sizes, metric
from camserve_server.rows import Blended

Steps = Annotated[int, Range(2, 10_000), "points of the curve, each ceil(H·W / steps) pixels further"]
Baseline = Annotated[
    Literal["blur", "black", "mean"], "what stands where a pixel is missing: the blurred image, black, the mean colour"
]
Area = Annotated[Literal["mean", "trapezoid"], "mean of the steps, or RISE's own trapezoids from 0 to 1, both included"]


def _rows(sizes: Sizes, *, steps: int = 224, auc: str = "mean", **_: object) -> int:
    return steps + (auc == "trapezoid")


@metric("insertion", title="Insertion", paper="arXiv:1806.07421", rows=_rows, higher_is_better=True)
def insertion(
    x: Image, c: Targets, S: Tensor, *, steps: Steps = 224, baseline: Baseline = "blur", auc: Area = "mean"
) -> Plan[MetricResult]:
    """Area under the probability while the most salient pixels are put into a baseline image first, in [0, 1].

    x [3, H, W], one class, S [H, W] in [0, 1].
    """
    return (yield from _curve("insertion", x, c, S, steps, baseline, auc))


@metric("deletion", title="Deletion", paper="arXiv:1806.07421", rows=_rows, higher_is_better=False)
def deletion(
    x: Image, c: Targets, S: Tensor, *, steps: Steps = 224, baseline: Baseline = "blur", auc: Area = "mean"
) -> Plan[MetricResult]:
    """Area under the probability while the most salient pixels are taken out of the image first, in [0, 1].

    x [3, H, W], one class, S [H, W] in [0, 1].
    """
    return (yield from _curve("deletion", x, c, S, steps, baseline, auc))


@metric(
    "insertion-deletion",
    title="Insertion − deletion",
    paper="arXiv:2204.13359",
    rows=lambda sizes, **p: 2 * _rows(sizes, **p),
    higher_is_better=True,
)
def insertion_deletion(
    x: Image, c: Targets, S: Tensor, *, steps: Steps = 224, baseline: Baseline = "blur", auc: Area = "mean"
) -> Plan[MetricResult]:
    """Insertion less deletion, in [−1, 1]: both at once, as the Poly-CAM paper sums a map up.

    x [3, H, W], one class, S [H, W] in [0, 1]. Where the two are asked for as well, their rows are shared.
    """
    higher = yield from _curve("insertion", x, c, S, steps, baseline, auc)
    lower = yield from _curve("deletion", x, c, S, steps, baseline, auc)
    return MetricResult(higher.value - lower.value)


def _curve(kind: str, x: Image, c: Targets, S: Tensor, steps: int, baseline: str, auc: str) -> Plan[MetricResult]:
    def area() -> Plan[MetricResult]:
        there, here = x.tensor, _baseline(x, baseline)
        over, under = (there, here) if kind == "insertion" else (here, there)
        return (yield from _area(over, under, c, S, steps, auc))

    return (yield from Cached((kind, steps, baseline, auc), steps + (auc == "trapezoid"), area))


def _area(over: Tensor, under: Tensor, c: Targets, S: Tensor, steps: int, auc: str) -> Plan[MetricResult]:
    pixels = S.numel()
    chunk = -(-pixels // steps)
    counts = [min(i * chunk, pixels) for i in range(0 if auc == "trapezoid" else 1, steps + 1)]
    scores = yield from Score(Blended(over, under, _rank(S), counts), c)
    curve = scores.probabilities[:, 0]
    area = (curve[1:] + curve[:-1]).sum() / (2 * steps) if auc == "trapezoid" else curve.mean()
    return MetricResult(float(area), tuple(curve.tolist()))


def _rank(S: Tensor) -> Tensor:
    """[H, W] → the place of each pixel in falling order of saliency, ties by falling index."""
    order = S.flatten().argsort(stable=True).flip(0)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank.view(S.shape)


def _baseline(x: Image, kind: str) -> Tensor:
    if kind == "blur":
        return _blur(x.tensor)
    return ((0 * x.mean - x.mean) / x.std if kind == "black" else torch.zeros_like(x.mean)).expand_as(x.tensor)


def _blur(x: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """[C, H, W] through a Gaussian of 11×11 pixels, σ 5, the borders reflected: the Poly-CAM paper's baseline."""
    half = size // 2
    if min(x.shape[-2:]) <= half:
        raise InvalidArgument(f"the blurred baseline needs an input of more than {half} pixels", field="metrics")
    at = torch.arange(size, dtype=x.dtype, device=x.device) - half
    g = torch.exp(-0.5 * (at / sigma) ** 2)
    g = g / g.sum()
    padded = F.pad(x[:, None], (half, half, half, half), mode="reflect")  # each channel by itself
    across: Tensor = F.conv2d(padded, g.view(1, 1, 1, -1))
    return F.conv2d(across, g.view(1, 1, -1, 1))[:, 0]
