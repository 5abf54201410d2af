"""GradientSHAP: A Unified Approach to Interpreting Model Predictions.

Scott Lundberg, Su-In Lee, 2017, arXiv:1705.07874.

The paper does not have it; it is defined by SHAP's GradientExplainer and by captum: the expectation of
(x + δ − b) · ∂y/∂x at b + α (x + δ − b), with noise δ, α uniform in [0, 1] and a baseline b, here 0. captum agrees.
"""

import torch
from torch import Tensor, nn

from tests.oracles.input_x_gradient import input_gradient


def gradient_shap(model: nn.Module, x: Tensor, c: int, alphas: Tensor, noise: Tensor) -> Tensor:
    """x [1, 3, H, W]; alphas [n] in [0, 1]; noise [n, 3, H, W], of the deviation wanted → map [H, W], signed, summed
    over channels."""
    M = torch.zeros_like(x[0])
    for n in range(len(noise)):
        sample = x + noise[n]
        M = M + sample[0] * input_gradient(model, alphas[n] * sample, c) / len(noise)
    return M.sum(0)
