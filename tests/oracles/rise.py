"""RISE: Randomized Input Sampling for Explanation of Black-box Models.

Vitali Petsiuk, Abir Das, Kate Saenko, 2018, arXiv:1806.07421.

The code of the authors agrees except for the outermost half cell of the upsampled grid, where scikit-image mirrors the
grid and torch repeats its edge.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.oracles.poly_cam import resize


def rise_masks(grids: Tensor, shifts: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks [N, H, W] of grids [N, s, s] of 0 and 1 and integer shifts [N, 2], smaller than a cell.

    A cell has ceil(H / s) × ceil(W / s) pixels. The grid is upsampled to s + 1 cells per side and cropped at the shift.
    """
    H, W = size
    s = grids.shape[1]
    cell = (math.ceil(H / s), math.ceil(W / s))
    masks = torch.zeros(len(grids), H, W, dtype=grids.dtype)
    for n in range(len(grids)):
        up = resize(grids[n], ((s + 1) * cell[0], (s + 1) * cell[1]))
        i, j = int(shifts[n, 0]), int(shifts[n, 1])
        masks[n] = up[i : i + H, j : j + W]
    return masks


@torch.no_grad()
def rise(model: Callable[[Tensor], Tensor], x: Tensor, c: int, masks: Tensor, p: float) -> Tensor:
    """Return the map [H, W] of class c for x [1, 3, H, W] and masks [N, H, W] with the mean p."""
    S = torch.zeros_like(masks[0])
    for M in masks:
        S = S + torch.softmax(model(x * M)[0], dim=0)[c] * M
    return S / (len(masks) * p)  # eq. 6
