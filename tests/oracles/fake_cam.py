"""Fake-CAM: Revisiting The Evaluation of Class Activation Mapping for Explainability.

Samuele Poppi, Marcella Cornia, Lorenzo Baraldi, Rita Cucchiara, 2021, arXiv:2104.10252.

No library has it: a map that explains nothing and scores well, for metrics to be tried on.
"""

import torch
from torch import Tensor


def fake_cam(size: tuple[int, int]) -> Tensor:
    """size (H, W) → map [H, W]: 1 everywhere, 0 at the top-left pixel."""
    M = torch.ones(size)
    M[0, 0] = 0
    return M
