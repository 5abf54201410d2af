"""Eigen-CAM: Class Activation Map using Principal Components.

Mohammed Bany Muhammad, Mohammed Yeasin, 2020, arXiv:2008.00299.

The paper projects the activations onto the first right singular vector, without centring them. grad-cam 1.5.7 centres
them first (`centred`) and takes the sign that LAPACK happens to give; then negative values become 0.

The sign: activations ≥ 0 have a first singular vector that can be chosen ≥ 0, and so has the map; the sign here is that
of a map with a sum ≥ 0. A centred map has no such sign: here its value of greatest magnitude is positive.
"""

import torch
from torch import Tensor


def eigen_cam(activation: Tensor, centred: bool = False) -> Tensor:
    """activation [K, h, w] → map [h, w], signed, before any scaling."""
    K, h, w = activation.shape
    # One row a pixel; in float64, for in float32 LAPACK finds no eigenvectors of a thousand channels of few pixels.
    O = activation.double().reshape(K, h * w).T  # noqa: E741 (the paper's letter)
    if centred:
        O = O - O.mean(0)  # noqa: E741
    _, V = torch.linalg.eigh(O.T @ O)  # eigenvalues rising; its eigenvectors are O's right singular vectors
    L = (O @ V[:, -1]).reshape(h, w)
    flip = -L.min() > L.max() if centred else L.sum() < 0
    return (-L if flip else L).to(activation.dtype)
