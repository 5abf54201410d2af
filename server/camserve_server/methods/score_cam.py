"""Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks.

Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu 2020, arXiv:1910.01279.
"""

from __future__ import annotations

from typing import Literal

import torch

from camserve_server.maps.channels import have_equal_weights, report_equal_weights, select_channels
from camserve_server.plan import Capture, Image, Plan, ReleaseRows, SaliencyMaps, Score, Targets
from camserve_server.registry import method
from camserve_server.rows import Masked


@method(
    "score-cam",
    title="Score-CAM",
    paper="arXiv:1910.01279",
    rows=lambda sizes, **_: 1 + sizes.channels[0],
    min_rows=lambda sizes, **_: 2,
)
def score_cam(
    x: Image,
    c: Targets,
    layer: str,
    *,
    score: Literal["logit", "probability"] = "logit",
    channel_softmax: bool = True,
) -> Plan[SaliencyMaps]:
    """Activations weighted by the score of the class under a mask of each channel: one forward pass per channel.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        layer: Layer with the activations A [K, h, w].
        score: Score of a masked image. The tables of the Poly-CAM paper use the probability.
        channel_softmax: Apply a softmax over the channels to the scores. The tables of the Poly-CAM paper use none.

    Returns:
        Maps [T, h, w], unitless, ≥ 0.

    Equations:
        M_k = n(up(A_k))                                            (eq. 4)
        w_k = softmax_k y_c(x ⊙ M_k)                                (algorithm 1)
        S   = relu(Σ_k w_k A_k)                                     (eq. 6)

        The score of the baseline image (eq. 5) is the same for all channels. The softmax cancels it; without the
        softmax it counts as zero. Masks are scaled after they are resized. torchcam scales them before, and the library
        grad-cam resizes with align_corners=True, so the maps of the three correlate, but differ.

    Advice:
        Use it for a map of the last layer without gradients. It is as coarse as Grad-CAM at a thousand times the cost.
        With logits as scores, the softmax often gives almost all of the weight to a few channels. Poly-CAM uses the
        same number of passes for a finer map.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    selected = select_channels(A, include_zero=True)
    yield from ReleaseRows(len(A) - len(selected))
    scores = yield from Score(Masked(x, A[selected.indices]), c, min_rows=1)  # algorithm 1, lines 6 to 11
    y = scores.logits if score == "logit" else scores.probabilities
    # algorithm 1, line 13
    w = (
        selected.to_all_channels(y, missing=-torch.inf).softmax(dim=0)
        if channel_softmax
        else selected.to_all_channels(y)
    )
    run = selected.indices[: len(y)]
    yield from report_equal_weights(c, have_equal_weights(w[run], A[run]))
    S = torch.einsum("kt,khw->thw", w.to(A.dtype), A).relu()  # eq. 6
    return SaliencyMaps(S, share=selected.share(len(y)))
