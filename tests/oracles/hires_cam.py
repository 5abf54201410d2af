"""HiRes-CAM: Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks.

Rachel Lea Draelos, Lawrence Carin, 2020, arXiv:2011.08891.

grad-cam 1.5.7 agrees; it too sets the negative values to 0.
"""

import torch
from torch import Tensor, nn

from tests.oracles.grad_cam import activation_and_gradient


def hires_cam(model: nn.Module, x: Tensor, layer: nn.Module, c: int, relu: bool = True) -> Tensor:
    """x [1, 3, H, W]; layer, a module of the model → map [h, w]; with relu=False the signed sum."""
    A, g = activation_and_gradient(model, x, layer, c)
    S = torch.zeros_like(A[0])
    for k in range(len(A)):
        S = S + g[k] * A[k]
    return S.relu() if relu else S
