"""LayerCAM: Exploring Hierarchical Class Activation Maps for Localization.

Jiang, Zhang, Hou, Cheng, Wei 2021, IEEE TIP 30:5875, doi:10.1109/TIP.2021.3089943.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from camserve_server.plan import Gradient, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import Range, method
from camserve_server.rows import Repeated, resize


@method(
    "layer-cam",
    title="Layer-CAM",
    paper="doi:10.1109/TIP.2021.3089943",
    rows=lambda sizes, **_: sizes.targets,
    passes="gradient",
)
def layer_cam(
    x: Image,
    c: Targets,
    layers: Sequence[str],
    *,
    scaled: Annotated[int, Range(0, 64)] = 2,
) -> Plan[SaliencyMaps]:
    """Activations weighted at each position by their positive gradients, for several layers: one backward pass.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layers: Layers, fine to coarse, with the activations A_l [K_l, h_l, w_l].
        scaled: Number of the finest layers that are tanh-scaled. The script of Poly-CAM scales 3.

    Returns:
        Maps [T, h, w] at the resolution of the finest layer, unitless, ≥ 0.

    Equations:
        S_l = relu(Σ_k relu(∂y_c/∂A_lk) ⊙ A_lk)                     (eq. 5, 6)
        S_l = tanh(2 S_l / max S_l)     for the finest layers, S_l / max S_l for the others
        S   = max_l up(S_l)

        The map of a single layer is not scaled.

    Advice:
        Use it for a fine map at the price of one backward pass. It is noisier than Poly-CAM, because the gradients of
        fine layers are noisy. If only a normalisation uses the layer of a transformer, as in HiRes-CAM, the map does
        not distinguish evidence for the class from evidence against it: the products with negative gradients have the
        same sum. Name the normalisation itself, such as `blocks.11.norm1`.
    """
    answer = yield from Gradient(Repeated(x, len(c)), c.index, layers)
    S = [
        (g.relu() * A).sum(dim=1).relu() for A, g in zip(answer.activations, answer.gradients, strict=True)
    ]  # eq. 5, 6
    if len(S) == 1:
        return SaliencyMaps(S[0])
    S = [_scaled(S_l, tanh=l < scaled) for l, S_l in enumerate(S)]
    size = (S[0].shape[-2], S[0].shape[-1])
    return SaliencyMaps(torch.stack([resize(S_l, size) for S_l in S]).amax(dim=0))


def _scaled(S: Tensor, *, tanh: bool) -> Tensor:
    """Divide maps [T, h, w] ≥ 0 by their maxima. Maps of zeros stay zeros, and maps that are not finite stay so."""
    most = S.amax(dim=(-2, -1), keepdim=True)
    S = torch.where(most == 0, 0.0, S / most)
    return (2 * S).tanh() if tanh else S
