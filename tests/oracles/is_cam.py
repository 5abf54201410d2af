"""IS-CAM: Integrated Score-CAM for axiomatic-based explanations.

Rakshit Naidu, Ankita Ghosh, Yash Maurya, Shamanth R. Nayak K., Soumya Snigdha Kundu, 2020, arXiv:2010.03023.

The scale of the mask rises from 0 to 1 in equal steps, and the scores are averaged. torchcam 0.5 does not agree: it
accumulates its steps, 1/N, then 3/N, then 6/N, up to 5.5 times the image for ten steps, and it scales masks as in its
SS-CAM (variant "torchcam").
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.oracles.score_cam import ScoreCam
from tests.oracles.ss_cam import Variant, mask, weighed


@torch.no_grad()
def is_cam(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    activation: Tensor,
    c: int,
    steps: int = 10,
    variant: Variant = "paper",
) -> ScoreCam:
    """Return the map of class c for x [1, 3, H, W] and its activation [K, h, w].

    The softmax cancels the score of the baseline.
    """
    scores = torch.zeros(len(activation), dtype=x.dtype)
    for k in range(len(activation)):
        M = mask(activation[k], (x.shape[2], x.shape[3]), variant)
        for i in range(1, steps + 1):
            part = i / steps if variant == "paper" else sum(range(1, i + 1)) / steps
            scores[k] += model(x * (part * M))[0, c] / steps
    return weighed(activation, scores)
