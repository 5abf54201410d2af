"""SS-CAM: Smoothed Score-CAM for Sharper Visual Feature Localization.

Haofan Wang, Rakshit Naidu, Joy Michael, Soumya Snigdha Kundu, 2020, arXiv:2006.14255.

The noise is added to the masks, as in the first variant of the paper. torchcam 0.5 agrees except for the masks: it
scales them before it upsamples them, with 1e-8 in the denominator, as in its Score-CAM (variant "torchcam"). Its
channels have different noise.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tests.oracles.poly_cam import resize, scaled
from tests.oracles.score_cam import ScoreCam

Variant = Literal["paper", "torchcam"]


def mask(A: Tensor, size: tuple[int, int], variant: Variant) -> Tensor:
    """Return the mask [H, W] in [0, 1] of A [h, w]."""
    if variant == "paper":
        return scaled(A, size, "paper")
    if variant == "torchcam":
        return resize((A - A.min()) / (A.max() - A.min() + 1e-8), size)
    raise ValueError(f"variant: {variant!r} is neither paper nor torchcam")


def weighed(activation: Tensor, scores: Tensor) -> ScoreCam:
    """Return the map of an activation [K, h, w] whose weights are the softmax of scores [K] over channels."""
    w = torch.softmax(scores, dim=0)
    S = torch.zeros_like(activation[0])
    for k in range(len(activation)):
        S = S + w[k] * activation[k]
    return ScoreCam(S.relu(), scores, w)


@torch.no_grad()
def ss_cam(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    activation: Tensor,
    c: int,
    noise: Tensor,
    variant: Variant = "paper",
) -> ScoreCam:
    """Return the map of class c for x [1, 3, H, W] and its activation [K, h, w].

    The noise is [n, K, H, W], or [n, 1, H, W] if the channels share it. The softmax cancels the score of the baseline.
    """
    K, n = len(activation), len(noise)
    fields = noise.expand(n, K, *x.shape[2:])
    scores = torch.zeros(K, dtype=x.dtype)
    for k in range(K):
        M = mask(activation[k], (x.shape[2], x.shape[3]), variant)
        for i in range(n):
            scores[k] += model(x * (M + fields[i, k]))[0, c] / n
    return weighed(activation, scores)
