"""CAM: Learning Deep Features for Discriminative Localization.

Bolei Zhou, Aditya Khosla, Agata Lapedriza, Aude Oliva, Antonio Torralba, 2016, arXiv:1512.04150.

torchcam 0.5 agrees: like the paper, it keeps the negative values.
"""

import torch
from torch import Tensor


def cam(activation: Tensor, weight: Tensor, c: int) -> Tensor:
    """activation [K, h, w], of the layer that is averaged; weight [classes, K], of the linear layer → map [h, w]."""
    M = torch.zeros_like(activation[0])
    for k in range(len(activation)):
        M = M + weight[c, k] * activation[k]
    return M
