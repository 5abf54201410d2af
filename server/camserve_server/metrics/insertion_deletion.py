"""RISE: Randomized Input Sampling for Explanation of Black-box Models, the insertion and deletion metrics.

Petsiuk, Das, Saenko 2018, arXiv:1806.07421; with the settings of the Poly-CAM paper (section 4.2.1, arXiv:2204.13359).
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

Steps = Annotated[int, Range(2, 10_000), "Number of points of the curve. Each point adds ceil(H·W / steps) pixels."]
Baseline = Annotated[
    Literal["blur", "black", "mean"], "Content of missing pixels: the blurred image, black, or the mean colour."
]
Area = Annotated[
    Literal["mean", "trapezoid"],
    "Rule for the area: the mean of the points, or the trapezoidal rule of RISE from 0 to 1, both included.",
]


def _rows(sizes: Sizes, *, steps: int = 224, auc: str = "mean", **_: object) -> int:
    return steps + (auc == "trapezoid")


@metric("insertion", title="Insertion", paper="arXiv:1806.07421", rows=_rows, higher_is_better=True)
def insertion(
    x: Image, c: Targets, S: Tensor, *, steps: Steps = 224, baseline: Baseline = "blur", auc: Area = "mean"
) -> Plan[MetricResult]:
    """Area under the probability while the most salient pixels are inserted into a baseline image, in [0, 1].

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        steps: Number of points of the curve.
        baseline: Baseline image.
        auc: Rule for the area under the curve.

    Returns:
        The area, in [0, 1]. The curve contains the probabilities.

    Raises:
        InvalidArgument: The image is too small for the blurred baseline.
    """
    return (yield from _curve("insertion", x, c, S, steps, baseline, auc))


@metric("deletion", title="Deletion", paper="arXiv:1806.07421", rows=_rows, higher_is_better=False)
def deletion(
    x: Image, c: Targets, S: Tensor, *, steps: Steps = 224, baseline: Baseline = "blur", auc: Area = "mean"
) -> Plan[MetricResult]:
    """Area under the probability while the most salient pixels are deleted from the image, in [0, 1].

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        steps: Number of points of the curve.
        baseline: Baseline image.
        auc: Rule for the area under the curve.

    Returns:
        The area, in [0, 1]. The curve contains the probabilities.

    Raises:
        InvalidArgument: The image is too small for the blurred baseline.
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
    """Insertion minus deletion, in [−1, 1]: one value for both, as in the Poly-CAM paper.

    If a request contains insertion or deletion, too, they share their rows.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        steps: Number of points of the curve.
        baseline: Baseline image.
        auc: Rule for the area under the curve.

    Returns:
        The difference, in [−1, 1].

    Raises:
        InvalidArgument: The image is too small for the blurred baseline.
    """
    higher = yield from _curve("insertion", x, c, S, steps, baseline, auc)
    lower = yield from _curve("deletion", x, c, S, steps, baseline, auc)
    return MetricResult(higher.value - lower.value)


def _curve(kind: str, x: Image, c: Targets, S: Tensor, steps: int, baseline: str, auc: str) -> Plan[MetricResult]:
    """Plan of insertion or deletion. Metrics of the same map share the result."""

    def area() -> Plan[MetricResult]:
        image, background = x.tensor, _baseline(x, baseline)
        over, under = (image, background) if kind == "insertion" else (background, image)
        return (yield from _area(over, under, c, S, steps, auc))

    return (yield from Cached((kind, steps, baseline, auc), steps + (auc == "trapezoid"), area))


def _area(over: Tensor, under: Tensor, c: Targets, S: Tensor, steps: int, auc: str) -> Plan[MetricResult]:
    """Plan of the area under the probability while `over` replaces `under`, the most salient pixels first."""
    pixels = S.numel()
    chunk = -(-pixels // steps)
    counts = [min(i * chunk, pixels) for i in range(0 if auc == "trapezoid" else 1, steps + 1)]
    scores = yield from Score(Blended(over, under, _rank(S), counts), c)
    curve = scores.probabilities[:, 0]
    area = (curve[1:] + curve[:-1]).sum() / (2 * steps) if auc == "trapezoid" else curve.mean()
    return MetricResult(float(area), tuple(curve.tolist()))


def _rank(S: Tensor) -> Tensor:
    """Return the rank [H, W] of each pixel in descending order of saliency. Equal values rank by descending index."""
    order = S.flatten().argsort(stable=True).flip(0)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank.view(S.shape)


def _baseline(x: Image, kind: str) -> Tensor:
    """Return the baseline image [3, H, W]."""
    if kind == "blur":
        return _blur(x.tensor)
    return ((0 * x.mean - x.mean) / x.std if kind == "black" else torch.zeros_like(x.mean)).expand_as(x.tensor)


def _blur(x: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """Blur x [C, H, W] by a Gaussian of 11×11 pixels, σ = 5, with reflected borders, as in the Poly-CAM paper."""
    half = size // 2
    if min(x.shape[-2:]) <= half:
        raise InvalidArgument(
            f"the input has {x.shape[-2]}×{x.shape[-1]} pixels; the baseline blur needs more than {half} on each side",
            field="metrics",
        )
    at = torch.arange(size, dtype=x.dtype, device=x.device) - half
    g = torch.exp(-0.5 * (at / sigma) ** 2)
    g = g / g.sum()
    padded = F.pad(x[:, None], (half, half, half, half), mode="reflect")  # Blur each channel separately.
    across: Tensor = F.conv2d(padded, g.view(1, 1, 1, -1))
    return F.conv2d(across, g.view(1, 1, -1, 1))[:, 0]
