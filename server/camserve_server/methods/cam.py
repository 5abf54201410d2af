"""CAM: Learning Deep Features for Discriminative Localization.

Zhou, Khosla, Lapedriza, Oliva, Torralba 2016, arXiv:1512.04150.
"""

from __future__ import annotations

import torch

from camserve_server.plan import Capture, ClassWeights, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method


@method("cam", title="CAM", paper="arXiv:1512.04150", rows=lambda sizes: 1, needs="gap")
def cam(x: Image, c: Targets) -> Plan[SaliencyMaps]:
    """Activations weighted by the class's weights in the last linear layer: one forward pass.

    Args:
        x: Image [3, H, W].
        c: T target classes.

    Returns:
        Maps [T, h, w], unitless, signed.

    Equations:
        S = Σ_k W_ck A_k                                            (eq. 2)

        W are the weights of the linear layer, and A the activations that are pooled in front of it.

    Advice:
        Use it if the network supports it. No other method is cheaper, and it shows exactly how much each position
        contributes to the logit. It is as coarse as the last layer and keeps negative evidence.
    """
    layer, W = yield from ClassWeights(c.index)  # [T, K]
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    return SaliencyMaps(torch.einsum("tk,khw->thw", W, A))  # eq. 2
