"""Integrated Gradients: Axiomatic Attribution for Deep Networks.

Mukund Sundararajan, Ankur Taly, Qiqi Yan, 2017, arXiv:1703.01365.

The integral uses Gauss–Legendre quadrature, as in captum. captum agrees.
"""

import torch
from torch import Tensor, nn

from tests.oracles.input_x_gradient import input_gradient


def gauss_legendre(n: int) -> tuple[list[float], list[float]]:
    """Return n nodes and weights on [0, 1], from the eigenvectors of the Jacobi matrix of the Legendre polynomials."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return ((1 + nodes) / 2).tolist(), (vectors[0] ** 2).tolist()


def integrated_gradients(model: nn.Module, x: Tensor, c: int, steps: int = 50) -> Tensor:
    """Return the signed map [H, W], summed over channels, for x [1, 3, H, W]. The baseline 0 is the mean colour."""
    integral = torch.zeros_like(x[0])
    for alpha, weight in zip(*gauss_legendre(steps), strict=True):
        integral = integral + weight * input_gradient(model, alpha * x, c)
    return (x[0] * integral).sum(0)  # eq. 1
