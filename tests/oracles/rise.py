"""RISE: Randomized Input Sampling for Explanation of Black-box Models.

Vitali Petsiuk, Abir Das, Kate Saenko, 2018, arXiv:1806.07421.

The authors' code agrees but for the outermost half cell of the upsampled grid: scikit-image mirrors the grid there,
torch repeats its edge.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.oracles.poly_cam import resize


def rise_masks(grids: Tensor, shifts: Tensor, size: tuple[int, int]) -> Tensor:
    """grids [N, s, s] of 0 and 1; shifts [N, 2], whole numbers from 0 to less than a cell's height, width → [N, H, W].

    A cell has ceil(H / s) × ceil(W / s) pixels; the grid is upsampled to s + 1 cells a side, and cut at the shift.
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
    """model [N, 3, H, W] → logits; x [1, 3, H, W]; masks [N, H, W], on average p → map [H, W]."""
    S = torch.zeros_like(masks[0])
    for M in masks:
        S = S + torch.softmax(model(x * M)[0], dim=0)[c] * M
    return S / (len(masks) * p)  # eq. 6
