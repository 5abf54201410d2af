"""Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks.

Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu 2020, arXiv:1910.01279.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from camserve_server.maps.channels import select_channels
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
    score: Annotated[
        Literal["logit", "probability"], "what is read off a masked image; the Poly-CAM tables used the probability"
    ] = "logit",
    channel_softmax: Annotated[bool, "softmax of the scores over the channels; the Poly-CAM tables used none"] = True,
) -> Plan[SaliencyMaps]:
    """Activations weighted by the class's score on the image masked by each of them: a forward pass a channel.

    x [3, H, W], c [T] class indices → maps [T, h, w], unitless, ≥ 0.

    Equations:
        M_k = n(up(A_k))                                            (eq. 4)
        w_k = softmax_k y_c(x ⊙ M_k)                                (algorithm 1)
        S   = relu(Σ_k w_k A_k)                                     (eq. 6)

    The score of the baseline image (eq. 5) is the same for all channels: the softmax cancels it, and without the
    softmax it is taken as zero. Masks are scaled after they are resized; torchcam scales them before, and the library
    grad-cam resizes with align_corners=True: maps of the three correlate, but differ.

    Advice:
        Take it for a map of the last layer without gradients. It is as coarse as Grad-CAM at a thousand times the cost;
        with logits as scores the softmax often lets a handful of channels win. Poly-CAM spends the same passes on a
        finer map.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    run = select_channels(A, dead=True)
    yield from ReleaseRows(len(A) - len(run))
    scores = yield from Score(Masked(x, A[run.indices]), c, min_rows=1)  # algorithm 1, lines 6 to 11
    y = scores.logits if score == "logit" else scores.probabilities
    # algorithm 1, line 13
    w = run.to_all_channels(y, missing=-torch.inf).softmax(dim=0) if channel_softmax else run.to_all_channels(y)
    S = torch.einsum("kt,khw->thw", w.to(A.dtype), A).relu()  # eq. 6
    return SaliencyMaps(S, share=run.share(len(y)))
