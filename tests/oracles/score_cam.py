"""Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks.

Haofan Wang, Zifan Wang, Mengnan Du, Fan Yang, Zijian Zhang, Sirui Ding, Piotr Mardziel, Xia Hu, 2020, arXiv:1910.01279.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ScoreCam:
    """Map [h, w] at the resolution of the activation, not scaled, and scores and weights [K]."""

    map: Tensor
    scores: Tensor
    weights: Tensor


@torch.no_grad()
def score_cam(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    activation: Tensor,
    c: int,
    score: Literal["logit", "probability"] = "logit",
    channel_softmax: bool = True,
) -> ScoreCam:
    """Return the map of class c for x [1, 3, H, W] and its activation [K, h, w]."""
    size = (x.shape[2], x.shape[3])
    scores = torch.zeros(len(activation), dtype=x.dtype)
    for k, A in enumerate(activation):
        H = F.interpolate(A[None, None], size, mode="bilinear", align_corners=False)
        contrast = H.max() - H.min() if A.min() < A.max() else torch.tensor(torch.inf)  # s(constant) = 0
        H = (H - H.min()) / contrast  # eq. 5 and 6
        y = model(x * H)[0]
        scores[k] = y[c] if score == "logit" else torch.softmax(y, dim=0)[c]  # eq. 4. The softmax cancels the baseline.
    w = torch.softmax(scores, dim=0) if channel_softmax else scores
    S = torch.zeros_like(activation[0])
    for k in range(len(activation)):
        S = S + w[k] * activation[k]
    return ScoreCam(S.relu(), scores, w)  # eq. 3
