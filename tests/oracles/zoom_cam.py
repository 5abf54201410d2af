"""Zoom-CAM: Generating Fine-grained Pixel Annotations from Image Labels.

Xiangwei Shi, Seyran Khademi, Yunqiang Li, Jan van Gemert, 2020, arXiv:2010.08644.

No library has it. The authors' code, too, scales each map by (S − min S)/max S, but upsamples the running maximum from
layer to layer; here every layer's map is upsampled once, to the size of the finest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.oracles.hires_cam import hires_cam
from tests.oracles.poly_cam import resize


def zoom_cam(model: nn.Module, x: Tensor, layers: Sequence[nn.Module], c: int) -> Tensor:
    """x [1, 3, H, W]; layers, fine to coarse → map [h, w] of the finest layer's size."""
    maps = [hires_cam(model, x, layer, c) for layer in layers]
    fused = torch.zeros_like(maps[0])
    for S in maps:
        M = (S - S.min()) / S.max() if S.max() > 0 else S
        fused = torch.maximum(fused, resize(M, (fused.shape[0], fused.shape[1])))
    return fused
