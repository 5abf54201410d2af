"""SmoothGrad: removing noise by adding noise.

Daniel Smilkov, Nikhil Thorat, Been Kim, Fernanda Viégas, Martin Wattenberg, 2017, arXiv:1706.03825.

The paper averages gradients. captum's NoiseTunnel around its Saliency averages their absolute values, which is the
default here. captum agrees with both. Its standard deviation is absolute, the paper's a share of the image's range.
"""

import torch
from torch import Tensor, nn

from tests.oracles.input_x_gradient import input_gradient


def smooth_grad(model: nn.Module, x: Tensor, c: int, noise: Tensor, absolute: bool = True) -> Tensor:
    """Return the map [H, W], summed over channels, for x [1, 3, H, W] and noise [n, 3, H, W]."""
    M = torch.zeros_like(x[0])
    for n in range(len(noise)):
        g = input_gradient(model, x + noise[n], c)
        M = M + (g.abs() if absolute else g) / len(noise)
    return M.sum(0)
