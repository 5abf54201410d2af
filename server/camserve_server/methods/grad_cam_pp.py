"""Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks.

Chattopadhay, Sarkar, Howlader, Balasubramanian 2018, arXiv:1710.11063.
"""

from __future__ import annotations

from typing import Literal

import torch

from camserve_server.plan import Gradient, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method
from camserve_server.rows import Repeated


@method(
    "grad-cam++", title="Grad-CAM++", paper="arXiv:1710.11063", rows=lambda sizes, **_: sizes.targets, passes="gradient"
)
def grad_cam_pp(
    x: Image,
    c: Targets,
    layer: str,
    *,
    variant: Literal["paper", "torchcam"] = "paper",
) -> Plan[SaliencyMaps]:
    """Activations weighted by positive gradients, each position by its share: one forward and backward pass.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].
        variant: torchcam 0.5 omits the denominator: its weights are Σ relu(g)³, as in the tables of the Poly-CAM paper.

    Returns:
        Maps [T, h, w], unitless, ≥ 0.

    Equations:
        g   = ∂y_c/∂A_k
        α_k = g² / (2 g² + (Σ_xy A_k) g³), 0 where g = 0            (eq. 19)
        w_k = Σ_xy α_k relu(g)                                      (eq. 8)
        S   = relu(Σ_k w_k A_k)

    Advice:
        Use it if the image contains several instances of the class. Otherwise it rarely differs much from Grad-CAM. The
        score is exp(y), as in the paper. Its derivatives are powers of g, up to a factor that the scaling removes.
    """
    answer = yield from Gradient(Repeated(x, len(c)), c.index, (layer,))
    A, g = answer.activations[0], answer.gradients[0]  # [T, K, h, w]
    if variant == "torchcam":
        w = g.relu().pow(3).sum(dim=(-2, -1))
    else:
        denominator = 2 * g.pow(2) + A.sum(dim=(-2, -1), keepdim=True) * g.pow(3)
        alpha = torch.where(denominator != 0, g.pow(2) / denominator, 0.0)  # eq. 19
        w = (alpha * g.relu()).sum(dim=(-2, -1))  # eq. 8
    return SaliencyMaps(torch.einsum("tk,tkhw->thw", w, A).relu())
