"""Integrated Gradients: Axiomatic Attribution for Deep Networks.

Sundararajan, Taly, Yan 2017, arXiv:1703.01365.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import numpy as np
from torch import Tensor

from camserve_server.plan import INPUT, Gradient, Gradients, Image, OnHost, Plan, SaliencyMaps, Sum, Targets
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import Perturbed, RepeatInterleaved


def _rows(sizes: Sizes, *, steps: int = 50, **_: object) -> int:
    return steps * sizes.targets


@method("integrated-gradients", title="Integrated Gradients", paper="arXiv:1703.01365", rows=_rows, passes="gradient")
def integrated_gradients(
    x: Image,
    c: Targets,
    *,
    steps: Annotated[int, Range(1, 1000)] = 50,
    signed: bool = False,
) -> Plan[SaliencyMaps]:
    """Integral of the gradient from the mean colour to the image: tens of forward and backward passes.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        steps: Number of nodes of the Gauss–Legendre quadrature.
        signed: Keep the sign, so that evidence against the class gets the lowest values.

    Returns:
        Maps [T, H, W], unitless, ≥ 0 unless `signed`.

    Equations:
        S = |Σ_rgb x ⊙ ∫₀¹ ∂y_c/∂x at a x  da|                      (eq. 1, the baseline being zero)

    Advice:
        Use it if the contributions must add up: without the absolute value, their sum is y_c(x) − y_c(mean colour). It
        is as fine as the image, and noisy. It cannot stop early, because the quadrature needs every node.
    """
    T = len(c)
    nodes, weights = yield from OnHost(partial(np.polynomial.legendre.leggauss, steps))  # a second for 1000 steps
    along = RepeatInterleaved(Perturbed(x, (0.5 * (nodes + 1)).tolist(), sigma=0, seed=0), T)

    def term(i: int, answer: Gradients) -> Tensor:
        return float(weights[i // T] / 2) * answer.gradients[0][0]

    integral = yield from Sum(Gradient(along, c.index * steps, (INPUT,)), term, groups=T)
    S = (x.tensor * integral.total).sum(dim=1)  # eq. 1
    return SaliencyMaps(S if signed else S.abs())
