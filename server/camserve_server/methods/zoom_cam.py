"""Zoom-CAM: Generating Fine-grained Pixel Annotations from Image Labels.

Shi, Khademi, Li, van Gemert 2020, arXiv:2010.08644.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camserve_server.maps.products import OTHER_LAYER, gradient_times_activation
from camserve_server.maps.rounding import is_constant
from camserve_server.plan import Gradient, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method
from camserve_server.rows import Repeated, resize


@method("zoom-cam", title="Zoom-CAM", paper="arXiv:2010.08644", rows=lambda sizes: sizes.targets, passes="gradient")
def zoom_cam(x: Image, c: Targets, layers: Sequence[str]) -> Plan[SaliencyMaps]:
    """Maximum over several layers of gradient times activation, scaled: one forward and backward pass.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layers: Layers, fine to coarse, with the activations A_l [K_l, h_l, w_l].

    Returns:
        Maps [T, H, W] at the size of the input, in [0, 1].

    Equations:
        S_l = relu(Σ_k ∂y_c/∂A_lk ⊙ A_lk)                           (eq. 4)
        S   = max_l up((S_l − min S_l) / max S_l)                   (eq. 5)

        The paper uses all layers: the 13 ReLUs of VGG16, and the first ReLU and the four blocks of ResNet50. By
        default, camserve uses the last layer of each resolution.

    Advice:
        Use it for the finest detail of gradients at the price of one backward pass. All layers have the same weight, so
        the noise of the first ones is visible. The map of a layer that only a normalisation uses is zero, as in
        HiRes-CAM.
    """
    answer = yield from Gradient(Repeated(x, len(c)), c.index, layers)
    pairs = zip(answer.gradients, answer.activations, strict=True)
    S, are_rounding = zip(*(gradient_times_activation(g, A, answer.rounding) for g, A in pairs), strict=True)  # eq. 4
    largest = torch.stack([resize(_scaled(S_l), x.size) for S_l in S]).amax(dim=0)  # eq. 5
    return SaliencyMaps(largest, zeroed=(torch.stack(are_rounding).any(dim=0), OTHER_LAYER))


def _scaled(S: Tensor) -> Tensor:
    """Scale maps [T, h, w] ≥ 0 to [0, 1]. Constant maps become zeros, and maps that are not finite stay so."""
    low, high = S.amin(dim=(-2, -1), keepdim=True), S.amax(dim=(-2, -1), keepdim=True)
    return torch.where(is_constant(S)[:, None, None], 0.0, (S - low) / high)
