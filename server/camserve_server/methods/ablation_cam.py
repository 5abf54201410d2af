"""Ablation-CAM: Visual Explanations for Deep Convolutional Network via Gradient-free Localization.

Desai, Ramaswamy 2020, WACV, doi:10.1109/WACV45572.2020.9093360.
"""

from __future__ import annotations

import torch

from camserve_server.maps.channels import share_of
from camserve_server.plan import Ablate, Capture, Image, MapWarning, Plan, ReleaseRows, Report, SaliencyMaps, Targets
from camserve_server.registry import method


@method(
    "ablation-cam",
    title="Ablation-CAM",
    paper="doi:10.1109/WACV45572.2020.9093360",
    rows=lambda sizes: 1 + sizes.channels[0],
    min_rows=lambda sizes: 2,
    needs="ablation",
)
def ablation_cam(x: Image, c: Targets, layer: str) -> Plan[SaliencyMaps]:
    """Activations weighted by the decrease of the logit when the channel is set to zero: one forward pass per channel.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].

    Returns:
        Maps [T, h, w], unitless, ≥ 0.

    Equations:
        w_k = (y_c − y_c without channel k) / y_c                   (eq. 3)
        S   = relu(Σ_k w_k A_k)                                     (eq. 4)

    Advice:
        Use it if you do not trust gradients. It expects a positive logit: a negative logit reverses the signs of the
        weights, and the map gets a warning. Channels that are zero everywhere take no row.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    strength = A.abs().sum(dim=(-2, -1), dtype=torch.float64)
    order = strength.argsort(descending=True, stable=True)  # The strongest first, in case it is cut short.
    order = order[strength[order] != 0]  # Includes channels that are not finite: the map must show them.
    yield from ReleaseRows(len(A) - len(order))
    if not len(order):
        return SaliencyMaps(A.new_zeros(len(c), *A.shape[1:]))
    for t, y in enumerate(c.y.tolist()):
        if y <= 0:
            yield from Report(
                MapWarning(f"class {c.index[t]} has the logit {y:.3g}; the weights expect a positive logit")
            )
    scores = yield from Ablate(x, c, layer, order.tolist(), min_rows=1)
    done = order[: len(scores.logits)]
    w = (c.y - scores.logits) / c.y  # eq. 3, [K, T]
    S = torch.einsum("kt,khw->thw", w.to(A.dtype), A[done]).relu()  # eq. 4
    return SaliencyMaps(S, share=share_of(torch.zeros_like(strength).index_fill(0, done, 1), strength))
