"""AOPC: Evaluating the visualization of what a Deep Neural Network has learned.

Samek, Binder, Montavon, Bach, Müller 2017, arXiv:1509.06321.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from camserve_server.plan import Image, MetricResult, Plan, Score, Targets
from camserve_server.registry import Range, Sizes, metric
from camserve_server.rows import Blended, generator


def _rows(sizes: Sizes, *, steps: int = 100, region: int = 9, **_: object) -> int:
    height, width = sizes.pixels
    return min(steps, -(-height // region) * -(-width // region))


@metric("aopc", title="AOPC", paper="arXiv:1509.06321", rows=_rows, higher_is_better=True)
def aopc(
    x: Image,
    c: Targets,
    S: Tensor,
    *,
    steps: Annotated[int, Range(1, 100_000)] = 100,
    region: Annotated[int, Range(1, 1000)] = 9,
    disturb: Literal["uniform", "mean"] = "uniform",
    seed: int,
) -> Plan[MetricResult]:
    """Mean fall of the probability while the most salient regions are perturbed one after the other, in [−1, 1].

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        steps: Number L of perturbed regions, at most the number of regions of the image.
        region: Side of a region in pixels.
        disturb: Content of a perturbed region: uniform noise over the range of pixels, or the mean colour.
        seed: Seed of the noise.

    Returns:
        1/(L + 1) Σ_k (p_c(x) − p_c(x with its first k regions perturbed)) over k = 0 … L (eq. 12), in [−1, 1]. The
        curve contains the probabilities. Regions with equal saliency keep their order in the image.
    """
    height, width = x.size
    relevance = F.avg_pool2d(S[None], region, ceil_mode=True, count_include_pad=False)[0]
    order = relevance.flatten().argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    tiles = place.view(relevance.shape).repeat_interleave(region, 0).repeat_interleave(region, 1)
    counts = range(1, min(steps, len(order)) + 1)
    scores = yield from Score(Blended(_perturbed(x, disturb, seed), x.tensor, tiles[:height, :width], counts), c)
    curve = torch.cat([c.p[:1], scores.probabilities[:, 0]])
    return MetricResult(float((c.p[0] - curve).mean()), tuple(curve.tolist()))


def _perturbed(x: Image, kind: str, seed: int) -> Tensor:
    """Return the input [3, H, W] that replaces the image in perturbed regions."""
    if kind == "mean":
        return torch.zeros_like(x.tensor)
    pixels = torch.rand(x.tensor.shape, generator=generator(seed)).to(x.tensor)
    return (pixels - x.mean) / x.std
