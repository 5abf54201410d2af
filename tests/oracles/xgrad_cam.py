"""XGrad-CAM: Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs.

Ruigang Fu, Qingyong Hu, Xiaohu Dong, Yulan Guo, Yinghui Gao, Biao Li, 2020, arXiv:2008.02312.

torchcam 0.5 (with 1e-8 in the denominator) and grad-cam 1.5.7 (with 1e-7) agree.
"""

import torch
from torch import Tensor, nn

from tests.oracles.grad_cam import GradCam, activation_and_gradient
from tests.oracles.grad_cam_pp import ratio


def xgrad_cam(model: nn.Module, x: Tensor, layer: nn.Module, c: int) -> GradCam:
    """Return the map of class c for x [1, 3, H, W]. A channel whose activations add up to 0 has the weight 0."""
    A, g = activation_and_gradient(model, x, layer, c)
    w = torch.zeros(len(A), dtype=A.dtype)
    S = torch.zeros_like(A[0])
    for k in range(len(A)):
        w[k] = ratio((A[k] * g[k]).sum(), A[k].sum())
        S = S + w[k] * A[k]
    return GradCam(S.relu(), A, g, w)
