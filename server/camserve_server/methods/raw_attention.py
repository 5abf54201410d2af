"""Raw attention: An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale.

Dosovitskiy et al. 2021, arXiv:2010.11929. The attention of the last block is a common baseline.
"""

from __future__ import annotations

from camserve_server.plan import CaptureAttention, Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method


@method(
    "raw-attention",
    title="Raw attention",
    paper="arXiv:2010.11929",
    rows=lambda sizes: 1,
    needs="attention",
    class_agnostic=True,
)
def raw_attention(x: Image, c: Targets) -> Plan[SaliencyMaps]:
    """Attention of the class token to each patch in the last block: one forward pass, the same map for every class.

    Args:
        x: Image [3, H, W].
        c: T target classes.

    Returns:
        Maps [T, h, w] with one value per patch, in [0, 1].

    Equations:
        S = mean over the heads of A_L, the row of the class token, without the tokens that are not of the image

    Advice:
        Use it as a baseline for transformers. It cannot distinguish classes, and attention to a token does not mean
        that the token is evidence for a class.
    """
    attentions = yield from CaptureAttention(x)
    S = attentions.blocks[-1].mean(dim=0)[0, attentions.prefix :]
    return SaliencyMaps(S.reshape(1, *attentions.grid).expand(len(c), -1, -1))
