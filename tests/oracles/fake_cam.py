"""Fake-CAM: Revisiting The Evaluation of Class Activation Mapping for Explainability.

Samuele Poppi, Marcella Cornia, Lorenzo Baraldi, Rita Cucchiara, 2021, arXiv:2104.10252.

No library has this map. It explains nothing and scores well in some metrics.
"""

import torch
from torch import Tensor


def fake_cam(size: tuple[int, int]) -> Tensor:
    """Return a map [H, W] that is 1 everywhere, and 0 at the top left pixel."""
    M = torch.ones(size)
    M[0, 0] = 0
    return M
