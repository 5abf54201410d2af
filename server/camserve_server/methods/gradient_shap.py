"""GradientSHAP: A Unified Approach to Interpreting Model Predictions.

Lundberg, Lee 2017, arXiv:1705.07874; computed as expected gradients on paths from the mean colour.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from camserve_server.plan import INPUT, Gradient, Gradients, Image, Plan, SaliencyMaps, Sum, Targets
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import Perturbed, RepeatInterleaved, generator


def _rows(sizes: Sizes, *, samples: int = 50, **_: object) -> int:
    return samples * sizes.targets


@method(
    "gradient-shap",
    title="GradientSHAP",
    paper="arXiv:1705.07874",
    rows=_rows,
    min_rows=lambda sizes, **_: sizes.targets,
    passes="gradient",
)
def gradient_shap(
    x: Image,
    c: Targets,
    *,
    samples: Annotated[int, Range(1, 10_000)] = 50,
    sigma: Annotated[float, Range(0, 100)] = 0.0,
    signed: bool = False,
    seed: int,
) -> Plan[SaliencyMaps]:
    """Image times gradient, averaged over random points of the path to the image: tens of forward and backward passes.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        samples: Number of random points between the mean colour and the noisy image.
        sigma: Standard deviation of the noise, in units of the normalised image.
        signed: Keep the sign, so that evidence against the class gets the lowest values.
        seed: Seed of the points and of the noise.

    Returns:
        Maps [T, H, W], unitless, ≥ 0 unless `signed`.

    Equations:
        S = |Σ_rgb mean_i (x + σ ε_i) ⊙ ∂y_c/∂x at a_i (x + σ ε_i)|,  a_i uniform in [0, 1]

    Advice:
        Use it instead of Integrated Gradients if a budget or a deadline may end it early: any number of samples gives
        an unbiased map. Noise spreads the paths.
    """
    T = len(c)
    a = torch.rand(samples, generator=generator(seed, samples), dtype=torch.float64)
    rows = Perturbed(x, a.tolist(), sigma, seed)

    def term(i: int, answer: Gradients) -> Tensor:
        return (rows.noisy(i // T) * answer.gradients[0][0]).sum(dim=0)

    query = Gradient(RepeatInterleaved(rows, T), c.index * samples, (INPUT,), min_rows=T)
    summed = yield from Sum(query, term, groups=T)
    S = summed.total / summed.counts.view(-1, 1, 1)
    return SaliencyMaps(S if signed else S.abs(), share=float(summed.counts.sum()) / (samples * T))
