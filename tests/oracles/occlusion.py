"""Occlusion: Visualizing and Understanding Convolutional Networks.

Matthew D. Zeiler, Rob Fergus, 2014, arXiv:1311.2901.

The windows follow captum: one starts every `stride` pixels until one reaches the border. The last one may exceed the
border, and its part inside the image counts as a window. captum returns this map for each channel, so its sum over
channels is three times this map.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def starts(length: int, window: int, stride: int) -> list[int]:
    """Return the starts of the windows along one side."""
    return [stride * i for i in range(math.ceil(max(length - window, 0) / stride) + 1)]


@torch.no_grad()
def occlusion(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    c: int,
    window: tuple[int, int] = (64, 64),
    stride: int | tuple[int, int] = 8,
) -> Tensor:
    """Return the signed map [H, W]: the mean of y_c(x) − y_c(occluded) over the windows that cover a pixel.

    `window` and `stride` are vertical and horizontal sizes in pixels. x is [1, 3, H, W].
    """
    _, _, H, W = x.shape
    down, across = (stride, stride) if isinstance(stride, int) else stride
    y = model(x)[0, c]
    total, count = torch.zeros(H, W, dtype=x.dtype), torch.zeros(H, W, dtype=x.dtype)
    for i in starts(H, window[0], down):
        for j in starts(W, window[1], across):
            occluded = x.clone()
            occluded[:, :, i : i + window[0], j : j + window[1]] = 0  # 0 is the mean colour.
            total[i : i + window[0], j : j + window[1]] += y - model(occluded)[0, c]
            count[i : i + window[0], j : j + window[1]] += 1
    return total / count
