"""SmoothGrad: removing noise by adding noise.

Smilkov, Thorat, Kim, Viégas, Wattenberg 2017, arXiv:1706.03825.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from camserve_server.plan import INPUT, Gradient, Gradients, Image, Plan, SaliencyMaps, Sum, Targets
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import Perturbed, RepeatInterleaved


def _rows(sizes: Sizes, *, samples: int = 50, **_: object) -> int:
    return samples * sizes.targets


@method(
    "smooth-grad",
    title="SmoothGrad",
    paper="arXiv:1706.03825",
    rows=_rows,
    min_rows=lambda sizes, **_: sizes.targets,
    passes="gradient",
)
def smooth_grad(
    x: Image,
    c: Targets,
    *,
    samples: Annotated[int, Range(1, 10_000)] = 50,
    sigma: Annotated[float, Range(0, 100)] = 1.0,
    seed: int,
) -> Plan[SaliencyMaps]:
    """Absolute value of the gradient, averaged over noisy images: tens of forward and backward passes.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        samples: Number of noisy images.
        sigma: Standard deviation of the noise, in units of the normalised image.
        seed: Seed of the noise.

    Returns:
        Maps [T, H, W], unitless, ≥ 0.

    Equations:
        S = Σ_rgb mean_i |∂y_c/∂x at x + σ ε_i|

    Advice:
        Use it to make the gradient readable for people. It shows where the logit is sensitive, which is not always
        where the class is. Fewer samples give a grainier map.
    """
    T = len(c)
    noisy = RepeatInterleaved(Perturbed(x, [1.0] * samples, sigma, seed), T)

    def term(i: int, answer: Gradients) -> Tensor:
        return answer.gradients[0][0].abs().sum(dim=0)

    summed = yield from Sum(Gradient(noisy, c.index * samples, (INPUT,), min_rows=T), term, groups=T)
    share = float(summed.counts.sum()) / (samples * T)
    return SaliencyMaps(summed.total / summed.counts.view(-1, 1, 1), share=share)
