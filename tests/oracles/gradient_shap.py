"""GradientSHAP: A Unified Approach to Interpreting Model Predictions.

Scott Lundberg, Su-In Lee, 2017, arXiv:1705.07874.

The paper does not contain this method. SHAP's GradientExplainer and captum define it: the expectation of
(x + δ − b) · ∂y/∂x at b + α (x + δ − b), with noise δ, α uniform in [0, 1] and a baseline b, here 0. captum agrees.
"""

import torch
from torch import Tensor, nn

from tests.oracles.input_x_gradient import input_gradient


def gradient_shap(model: nn.Module, x: Tensor, c: int, alphas: Tensor, noise: Tensor) -> Tensor:
    """Return the signed map [H, W], summed over channels, for x [1, 3, H, W].

    Args:
        model: The network.
        x: Image [1, 3, H, W].
        c: Class index.
        alphas: Factors α [n] in [0, 1].
        noise: Noise δ [n, 3, H, W] with the final standard deviation.
    """
    M = torch.zeros_like(x[0])
    for n in range(len(noise)):
        sample = x + noise[n]
        M = M + sample[0] * input_gradient(model, alphas[n] * sample, c) / len(noise)
    return M.sum(0)
