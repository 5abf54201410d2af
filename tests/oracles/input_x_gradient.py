"""Input × Gradient: Not Just a Black Box: Learning Important Features Through Propagating Activation Differences.

Avanti Shrikumar, Peyton Greenside, Anna Shcherbina, Anshul Kundaje, 2016, arXiv:1605.01713.

captum agrees.
"""

import torch
from torch import Tensor, nn


def input_gradient(model: nn.Module, x: Tensor, c: int) -> Tensor:
    """Return ∂y_c/∂x [3, H, W] for x [1, 3, H, W]."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, c], x)
    return gradient[0]


def input_x_gradient(model: nn.Module, x: Tensor, c: int) -> Tensor:
    """Return the signed map [H, W], summed over channels, for x [1, 3, H, W]."""
    return (x[0] * input_gradient(model, x, c)).sum(0)
