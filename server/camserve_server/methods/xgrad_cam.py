"""XGrad-CAM: Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs.

Fu, Hu, Dong, Guo, Gao, Li 2020, arXiv:2008.02312.
"""

from __future__ import annotations

import torch

from camserve_server.maps.products import sums_are_rounding
from camserve_server.plan import Gradient, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method
from camserve_server.rows import Repeated


@method("xgrad-cam", title="XGrad-CAM", paper="arXiv:2008.02312", rows=lambda sizes: sizes.targets, passes="gradient")
def xgrad_cam(x: Image, c: Targets, layer: str) -> Plan[SaliencyMaps]:
    """Activations weighted by the mean gradient where they are active: one forward and backward pass.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].

    Returns:
        Maps [T, h, w], unitless, ≥ 0.

    Equations:
        w_k = Σ_xy (A_k / Σ_xy A_k) ∂y_c/∂A_k, 0 where Σ_xy A_k = 0 (eq. 8)
        S   = relu(Σ_k w_k A_k)

    Advice:
        Use it instead of Grad-CAM if the gradient varies over the positions, as in VGG: the sum of the map is then
        nearer to the logit. For a head of global average pooling, both maps are equal. The map is zero for the output
        of an instance norm without an affine function, where Σ_xy A_k = 0.
    """
    answer = yield from Gradient(Repeated(x, len(c)), c.index, (layer,))
    A, dA = answer.activations[0], answer.gradients[0]  # [T, K, h, w]
    total = A.sum(dim=(-2, -1))
    is_zero = (total == 0) | sums_are_rounding(A)
    w = torch.where(is_zero, 0.0, (A * dA).sum(dim=(-2, -1)) / total)  # eq. 8
    return SaliencyMaps(torch.einsum("tk,tkhw->thw", w, A).relu())
