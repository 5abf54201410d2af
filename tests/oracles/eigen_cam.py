"""Eigen-CAM: Class Activation Map using Principal Components.

Mohammed Bany Muhammad, Mohammed Yeasin, 2020, arXiv:2008.00299.

The paper projects the activations onto the first right singular vector, without centring them. grad-cam 1.5.7 centres
them first (`centred`), uses the sign that LAPACK returns, and sets negative values to 0.

The sign is arbitrary. For activations ≥ 0, the first singular vector and the map can be chosen ≥ 0, so the sign here is
the one of a map with a sum ≥ 0. For a centred map, the sign here makes the value of greatest magnitude positive.
"""

import torch
from torch import Tensor


def eigen_cam(activation: Tensor, centred: bool = False) -> Tensor:
    """Return the signed map [h, w] of an activation [K, h, w], not scaled."""
    K, h, w = activation.shape
    # One row per pixel. In float32, LAPACK does not find the eigenvectors of a thousand channels with few pixels.
    O = activation.double().reshape(K, h * w).T  # noqa: E741 (letter of the paper)
    if centred:
        O = O - O.mean(0)  # noqa: E741
    _, V = torch.linalg.eigh(O.T @ O)  # The eigenvalues ascend. V are right singular vectors of O.
    L: Tensor = (O @ V[:, -1]).reshape(h, w)
    flip = -L.min() > L.max() if centred else L.sum() < 0
    return (-L if flip else L).to(activation.dtype)
