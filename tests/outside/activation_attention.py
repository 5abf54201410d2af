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
    power: Annotated[float, Range(1, 8), "the paper's p: the larger, the more the strongest channel decides"] = 2.0,
) -> Plan[SaliencyMaps]:
    """How strong all channels are, place by place: one forward pass, the same map for every class.

    x [3, H, W], c [T] class indices → maps [T, h, w], unitless, ≥ 0.

    Equations:
        S = Σ_k |A_k|^p

    Advice:
        Take it to see where a layer is active at all. It cannot explain one class against another.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    return SaliencyMaps(A.abs().pow(power).sum(dim=0).expand(len(c), -1, -1))
