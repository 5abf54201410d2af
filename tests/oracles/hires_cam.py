"""HiRes-CAM: Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks.

Rachel Lea Draelos, Lawrence Carin, 2020, arXiv:2011.08891.

grad-cam 1.5.7 agrees. It also sets negative values to 0.
"""

import torch
from torch import Tensor, nn

from tests.oracles.grad_cam import activation_and_gradient


def hires_cam(model: nn.Module, x: Tensor, layer: nn.Module, c: int, relu: bool = True) -> Tensor:
    """Return the map [h, w] of class c for x [1, 3, H, W] and a module of the model, signed if relu is False."""
    A, g = activation_and_gradient(model, x, layer, c)
    S = torch.zeros_like(A[0])
    for k in range(len(A)):
        S = S + g[k] * A[k]
    return S.relu() if relu else S
