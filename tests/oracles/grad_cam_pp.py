"""Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks.

Aditya Chattopadhyay, Anirban Sarkar, Prantik Howlader, Vineeth N. Balasubramanian, 2018, arXiv:1710.11063.

grad-cam 1.5.7 agrees, except for the 1e-6 in its denominator, which matters for small gradients. torchcam 0.5 does not
agree: it divides a copy, so its α is g² and its weights are Σ relu(g)³ (variant "torchcam").

The score is exp(y) for the logit y, and y is treated as linear in A. The derivatives of the score are then exp(y) times
g, g² and g³. The factor exp(y) cancels in α. It is a common positive factor of the weights and is omitted here.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from tests.oracles.grad_cam import GradCam, activation_and_gradient


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the ratio, or 0 if the denominator is 0. The gradient is then 0, too, and has no weight."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)


def grad_cam_pp(
    model: nn.Module,
    x: Tensor,
    layer: nn.Module,
    c: int,
    variant: Literal["paper", "torchcam"] = "paper",
    eps: float = 0.0,
) -> GradCam:
    """Return the map of class c for x [1, 3, H, W]. `eps` is added to the denominator of α (1e-6 in grad-cam)."""
    A, g = activation_and_gradient(model, x, layer, c)
    w = torch.zeros(len(A), dtype=A.dtype)
    S = torch.zeros_like(A[0])
    for k in range(len(A)):
        if variant == "paper":
            alpha = ratio(g[k] ** 2, 2 * g[k] ** 2 + A[k].sum() * g[k] ** 3 + eps)  # eq. 19
        elif variant == "torchcam":
            alpha = g[k] ** 2
        else:
            raise ValueError(f"variant: {variant!r} is neither paper nor torchcam")
        w[k] = (alpha * g[k].relu()).sum()  # eq. 7
        S = S + w[k] * A[k]
    return GradCam(S.relu(), A, g, w)
