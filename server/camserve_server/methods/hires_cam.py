"""HiResCAM: Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks.

Draelos, Carin 2020, arXiv:2011.08891.
"""

from __future__ import annotations

from camserve_server.maps.products import OTHER_LAYER, gradient_times_activation
from camserve_server.plan import Gradient, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method
from camserve_server.rows import Repeated


@method("hires-cam", title="HiRes-CAM", paper="arXiv:2011.08891", rows=lambda sizes: sizes.targets, passes="gradient")
def hires_cam(x: Image, c: Targets, layer: str) -> Plan[SaliencyMaps]:
    """Gradient times activation at each position: one forward and backward pass.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].

    Returns:
        Maps [T, h, w], unitless, ≥ 0.

    Equations:
        S = relu(Σ_k ∂y_c/∂A_k ⊙ A_k)                               (eq. 6)

    Advice:
        Use it if the map must not show positions that the class did not use. Grad-CAM can show them, because it
        averages the gradient. In earlier layers it is finer and noisier. In a transformer, the sum is zero if only a
        normalisation uses the layer, as in the default layer of networks with a class token. The map is then zero, too.
        Name the normalisation itself, such as `blocks.11.norm1`.
    """
    answer = yield from Gradient(Repeated(x, len(c)), c.index, (layer,))
    S, is_rounding = gradient_times_activation(answer.gradients[0], answer.activations[0], answer.rounding)  # eq. 6
    return SaliencyMaps(S, zeroed=(is_rounding, OTHER_LAYER))
