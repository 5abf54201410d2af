"""CAM: Learning Deep Features for Discriminative Localization.

Bolei Zhou, Aditya Khosla, Agata Lapedriza, Aude Oliva, Antonio Torralba, 2016, arXiv:1512.04150.

torchcam 0.5 agrees. Like the paper, it keeps negative values.
"""

import torch
from torch import Tensor


def cam(activation: Tensor, weight: Tensor, c: int) -> Tensor:
    """Return the map [h, w] of the pooled activation [K, h, w] and the weight [classes, K] of the linear layer."""
    M = torch.zeros_like(activation[0])
    for k in range(len(activation)):
        M = M + weight[c, k] * activation[k]
    return M
