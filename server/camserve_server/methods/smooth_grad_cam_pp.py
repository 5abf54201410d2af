"""Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for Deep Convolutional Neural Networks.

Omeiza, Speakman, Cintas, Weldermariam 2019, arXiv:1908.01224.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from camserve_server.plan import Capture, Gradient, Gradients, Image, Plan, SaliencyMaps, Sum, Targets
from camserve_server.registry import Range, Sizes, method
from camserve_server.rows import Perturbed, RepeatInterleaved


def _rows(sizes: Sizes, *, samples: int = 4, **_: object) -> int:
    return 1 + samples * sizes.targets


def _min_rows(sizes: Sizes, *, samples: int = 4, variant: str = "paper", **_: object) -> int:
    return 1 + (samples if variant == "torchcam" else 1) * sizes.targets


@method(
    "smooth-grad-cam++",
    title="Smooth Grad-CAM++",
    paper="arXiv:1908.01224",
    rows=_rows,
    min_rows=_min_rows,
    passes="gradient",
)
def smooth_grad_cam_pp(
    x: Image,
    c: Targets,
    layer: str,
    *,
    samples: Annotated[int, Range(1, 10_000)] = 4,
    sigma: Annotated[float, Range(0, 100)] = 0.3,
    variant: Literal["paper", "torchcam"] = "paper",
    seed: int,
) -> Plan[SaliencyMaps]:
    """Grad-CAM++ with the powers of the gradient averaged over noisy images: some forward and backward passes.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].
        samples: Number of noisy images.
        sigma: Standard deviation of the noise, in units of the normalised image.
        variant: torchcam 0.5 uses relu(g) and A of the last noisy image only, and Σ A D_3 at each position.
        seed: Seed of the noise.

    Returns:
        Maps [T, h, w], unitless, ≥ 0.

    Equations:
        D_p = mean_i (∂y_c/∂A_k at x + σ ε_i)^p
        α_k = D_2 / (2 D_2 + (Σ_xy A_k) D_3), 0 where D_2 = 0
        w_k = Σ_xy α_k relu(D_1)
        S   = relu(Σ_k w_k A_k)

        A are the activations of the image without noise.

    Advice:
        Use it if the map of Grad-CAM++ changes much with small changes of the image. A few samples suffice: their map
        hardly depends on the seed. It is as coarse as the layer.
    """
    T = len(c)
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]

    def powers(i: int, answer: Gradients) -> Tensor:
        g = answer.gradients[0][0]
        last = i // T == samples - 1  # torchcam keeps only the last noisy image.
        kept = [last * g, last * answer.activations[0][0]] if variant == "torchcam" else [g]
        return torch.stack([g.pow(2), g.pow(3), *kept])

    noisy = RepeatInterleaved(Perturbed(x, [1.0] * samples, sigma, seed), T)
    least = samples * T if variant == "torchcam" else T
    summed = yield from Sum(Gradient(noisy, c.index * samples, (layer,), min_rows=least), powers, groups=T)
    D2, D3, *kept = (summed.total / summed.counts.view(-1, 1, 1, 1, 1)).unbind(1)  # [T, K, h, w]
    if variant == "torchcam":
        weighted = (A * D3).sum(dim=(-2, -1), keepdim=True) + 1e-8  # The constant matters for small gradients.
        g, last = samples * kept[0], samples * kept[1]
    else:
        weighted = A.sum(dim=(-2, -1), keepdim=True) * D3
        g, last = kept[0], A.expand_as(D2)
    denominator = 2 * D2 + weighted
    alpha = torch.where(denominator != 0, D2 / denominator, 0.0)
    w = (alpha * g.relu()).sum(dim=(-2, -1))
    S = torch.einsum("tk,tkhw->thw", w, last).relu()
    return SaliencyMaps(S, share=float(summed.counts.sum()) / (samples * T))
