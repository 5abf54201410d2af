"""Activation attention: Paying More Attention to Attention.

Zagoruyko, Komodakis 2017, arXiv:1612.03928.
"""

from __future__ import annotations

from typing import Annotated

from camserve_server.plan import Capture, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import Range, method


@method(
    "activation-attention",
    title="Activation attention",
    paper="arXiv:1612.03928",
    rows=lambda sizes, **_: 1,
    class_agnostic=True,
)
def activation_attention(
    x: Image,
    c: Targets,
    layer: str,
    *,
    power: Annotated[float, Range(1, 8)] = 2.0,
) -> Plan[SaliencyMaps]:
    """Strength of all channels at each position: one forward pass, the same map for every class.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].
        power: The p of the paper. The larger it is, the more the strongest channel dominates.

    Returns:
        Maps [T, h, w], unitless, ≥ 0.

    Equations:
        S = Σ_k |A_k|^p

    Advice:
        Use it to see the positions where a layer is active. It cannot distinguish classes.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    return SaliencyMaps(A.abs().pow(power).sum(dim=0).expand(len(c), -1, -1))
