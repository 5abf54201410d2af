"""Center-Gaussian: Evaluation for Weakly Supervised Object Localization: Protocol, Metrics, and Datasets.

Junsuk Choe, Seong Joon Oh, Sanghyuk Chun, Seungho Lee, Zeynep Akata, Hyunjung Shim, 2020, arXiv:2007.04178.
"""

import math

import torch
from torch import Tensor


def center_gaussian(size: tuple[int, int], share: float) -> Tensor:
    """Return a Gaussian [H, W] with the value 1 at the centre. σ is `share` times the shorter side."""
    H, W = size
    sigma = share * min(H, W)
    M = torch.zeros(size, dtype=torch.float64)
    for i in range(H):
        for j in range(W):
            distance = math.hypot(i + 0.5 - H / 2, j + 0.5 - W / 2)  # From centre to centre.
            M[i, j] = math.exp(-0.5 * (distance / sigma) ** 2)
    return M
