"""Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for Deep Convolutional Neural Network Models.

Daniel Omeiza, Skyler Speakman, Celia Cintas, Komminist Weldermariam, 2019, arXiv:1908.01224.

Grad-CAM++ with means over noisy samples: of g² and g³ in α, and of g in the weights. The activations are those of the
clean image. The paper prints the mean of g instead of g² as the numerator of α. This is an error, because without noise
the result would not be Grad-CAM++.

torchcam 0.5 does not agree (variant "torchcam"): its denominator has Σ (A·g³) + 1e-8 instead of (Σ A)·g³. Its weights
use the gradient of the last sample, and its map the activations of the last sample.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from tests.oracles.grad_cam import GradCam, activation_and_gradient
from tests.oracles.grad_cam_pp import ratio


def smooth_grad_cam_pp(
    model: nn.Module,
    x: Tensor,
    layer: nn.Module,
    c: int,
    noise: Tensor,
    variant: Literal["paper", "torchcam"] = "paper",
) -> GradCam:
    """Return the map of class c for the samples x + noise, x [1, 3, H, W] and noise [n, 3, H, W].

    `activation` of the result is the weighted one, and `gradient` the one in the weights.
    """
    if variant not in ("paper", "torchcam"):
        raise ValueError(f"variant: {variant!r} is neither paper nor torchcam")
    A, _ = activation_and_gradient(model, x, layer, c)
    D1, D2, D3 = torch.zeros_like(A), torch.zeros_like(A), torch.zeros_like(A)
    for n in range(len(noise)):
        A_last, g = activation_and_gradient(model, x + noise[n], layer, c)
        D1 = D1 + g / len(noise)
        D2 = D2 + g**2 / len(noise)
        D3 = D3 + g**3 / len(noise)
    gradient, activation = (D1, A) if variant == "paper" else (g, A_last)
    w = torch.zeros(len(A), dtype=A.dtype)
    S = torch.zeros_like(A[0])
    for k in range(len(A)):
        if variant == "paper":
            alpha = ratio(D2[k], 2 * D2[k] + A[k].sum() * D3[k])
        else:
            alpha = D2[k] / (2 * D2[k] + (A[k] * D3[k]).sum() + 1e-8)
        w[k] = (alpha * gradient[k].relu()).sum()
        S = S + w[k] * activation[k]
    return GradCam(S.relu(), activation, gradient, w)
