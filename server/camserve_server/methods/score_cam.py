"""Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks.

Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu 2020, arXiv:1910.01279.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from camserve_server.plan import Capture, Image, Plan, SaliencyMaps, Score, Targets
from camserve_server.registry import method
from camserve_server.rows import Masked


@method("score-cam", title="Score-CAM", paper="arXiv:1910.01279", rows=lambda sizes, **_: 1 + sizes.channels[0])
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

    x [3, H, W], c [T] class indices → maps [T, h, w], unitless, ≥ 0. The score of the baseline image (eq. 5) is the
    same for all channels: the softmax cancels it, and without the softmax it is taken as zero.
    """
    (A,) = yield from Capture(x, (layer,))  # [K, h, w]
    live = A.flatten(1).any(dim=1)  # a channel that is zero everywhere adds nothing, whatever its weight
    scores = yield from Score(Masked(x, A), c)  # algorithm 1, lines 6 to 11
    w = scores.logits if score == "logit" else scores.probabilities  # [K, T]
    if channel_softmax:
        w = w.softmax(dim=0)  # algorithm 1, line 13
    w = torch.where(live[:, None], w, 0.0).to(A.dtype)
    return SaliencyMaps(torch.einsum("kt,khw->thw", w, A).relu())  # eq. 6
