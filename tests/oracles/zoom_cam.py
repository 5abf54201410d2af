"""Zoom-CAM: Generating Fine-grained Pixel Annotations from Image Labels.

Xiangwei Shi, Seyran Khademi, Yunqiang Li, Jan van Gemert, 2020, arXiv:2010.08644.

No library has this method. The code of the authors also scales each map by (S − min S)/max S, but upsamples the running
maximum from layer to layer. Here, the map of each layer is upsampled once, to `size` or to that of the finest layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.oracles.hires_cam import hires_cam
from tests.oracles.poly_cam import resize


def zoom_cam(
    model: nn.Module, x: Tensor, layers: Sequence[nn.Module], c: int, size: tuple[int, int] | None = None
) -> Tensor:
    """Return the map of class c for x [1, 3, H, W] and layers, fine to coarse, at `size` or the finest size."""
    maps = [hires_cam(model, x, layer, c) for layer in layers]
    h, w = size or maps[0].shape
    fused = torch.zeros(h, w, dtype=x.dtype)
    for S in maps:
        M = (S - S.min()) / S.max() if S.max() > 0 else S
        fused = torch.maximum(fused, resize(M, (h, w)))
    return fused
