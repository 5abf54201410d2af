"""Zoom-CAM: Generating Fine-grained Pixel Annotations from Image Labels.

Shi, Khademi, Li, van Gemert 2020, arXiv:2010.08644.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camserve_server.plan import Gradient, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method
from camserve_server.rows import Repeated, resize


@method("zoom-cam", title="Zoom-CAM", paper="arXiv:2010.08644", rows=lambda sizes: sizes.targets)
def zoom_cam(x: Image, c: Targets, layers: Sequence[str]) -> Plan[SaliencyMaps]:
    """Gradient times activation of every layer, scaled, and the largest taken: one forward and backward pass.

    x [3, H, W], c [T] class indices, layers fine to coarse → maps [T, H, W] of the input's size, in [0, 1].

    Equations:
        S_l = relu(Σ_k ∂y_c/∂A_lk ⊙ A_lk)                           (eq. 4)
        S   = max_l up((S_l − min S_l) / max S_l)                   (eq. 5)

    The paper joins all layers: its 13 ReLUs in VGG16; ResNet50's first ReLU and its four blocks. Those of a change of
    resolution are taken unless layers are named.

    Advice:
        Take it for the finest detail of gradients at the price of one backward pass. Every layer counts as much as the
        last one, so the noise of the first ones shows.
    """
    answer = yield from Gradient(Repeated(x, len(c)), c.index, layers)
    S = [(A * g).sum(dim=1).relu() for A, g in zip(answer.activations, answer.gradients, strict=True)]  # eq. 4
    return SaliencyMaps(torch.stack([resize(_scaled(S_l), x.size) for S_l in S]).amax(dim=0))  # eq. 5


def _scaled(S: Tensor) -> Tensor:
    """[T, h, w], ≥ 0 → the same in [0, 1]."""
    low, high = S.amin(dim=(-2, -1), keepdim=True), S.amax(dim=(-2, -1), keepdim=True)
    return torch.where(high > 0, (S - low) / high, 0.0)
