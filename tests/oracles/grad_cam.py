"""Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization.

Ramprasaath R. Selvaraju, Michael Cogswell, Abhishek Das, Ramakrishna Vedantam, Devi Parikh, Dhruv Batra, 2017,
arXiv:1610.02391.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class GradCam:
    """Result of Grad-CAM and similar methods.

    Attributes:
        map: Map [h, w] at the resolution of the layer, not scaled.
        activation: Activation [K, h, w].
        gradient: Gradient of the logit [K, h, w].
        weights: Weights [K].
    """

    map: Tensor
    activation: Tensor
    gradient: Tensor
    weights: Tensor


def activation_and_gradient(model: nn.Module, x: Tensor, layer: nn.Module, c: int) -> tuple[Tensor, Tensor]:
    """Return A and ∂y_c/∂A, both [K, h, w], of the last call of the layer, for x [1, 3, H, W]."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        seen.append(output)
        return output.clone()  # A following in-place ReLU would overwrite the output.

    handle = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            y = model(x.clone().requires_grad_())[0, c]
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(y, seen[-1])
    return seen[-1].detach()[0], gradient[0]


def grad_cam(model: nn.Module, x: Tensor, layer: nn.Module, c: int) -> GradCam:
    """Return the map of class c for x [1, 3, H, W] and a module of the model."""
    A, g = activation_and_gradient(model, x, layer, c)
    w = torch.zeros(len(A), dtype=A.dtype)
    S = torch.zeros_like(A[0])
    for k in range(len(A)):
        w[k] = g[k].mean()  # eq. 1
        S = S + w[k] * A[k]
    return GradCam(S.relu(), A, g, w)  # eq. 2
