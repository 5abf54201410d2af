"""Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization.

Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra 2017, arXiv:1610.02391.
"""

from __future__ import annotations

import torch

from camserve_server.maps.products import sums_are_rounding
from camserve_server.plan import Gradient, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method
from camserve_server.rows import Repeated


@method("grad-cam", title="Grad-CAM", paper="arXiv:1610.02391", rows=lambda sizes: sizes.targets, passes="gradient")
def grad_cam(x: Image, c: Targets, layer: str) -> Plan[SaliencyMaps]:
    """Activations weighted by the mean gradient of the class's logit: one forward and backward pass.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].

    Returns:
        Maps [T, h, w], unitless, ≥ 0.

    Equations:
        w_k = mean_xy ∂y_c/∂A_k                                     (eq. 1)
        S   = relu(Σ_k w_k A_k)                                     (eq. 2)

    Advice:
        Use it for a quick map of the right location. It is as coarse as the layer, 7 × 7 for most networks. Use the
        last layer: the mean gradient of early layers carries little information. It is zero in layers that only an
        instance norm uses, and so is the map.
    """
    answer = yield from Gradient(Repeated(x, len(c)), c.index, (layer,))
    A, dA = answer.activations[0], answer.gradients[0]  # [T, K, h, w]
    w = torch.where(sums_are_rounding(dA), 0.0, dA.mean(dim=(-2, -1)))  # eq. 1
    return SaliencyMaps(torch.einsum("tk,tkhw->thw", w, A).relu())  # eq. 2
