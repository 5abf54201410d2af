"""LayerCAM: Exploring Hierarchical Class Activation Maps for Localization.

Peng-Tao Jiang, Chang-Bin Zhang, Qibin Hou, Ming-Ming Cheng, Yunchao Wei, 2021, IEEE TIP 30:5875–5888.

For one layer, torchcam 0.5 and grad-cam 1.5.7 agree. For several layers, `fuse_cams` of torchcam scales all maps by
tanh, the paper only those of the shallow layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.oracles.grad_cam import activation_and_gradient
from tests.oracles.poly_cam import resize


def layer_cam(model: nn.Module, x: Tensor, layer: nn.Module, c: int) -> Tensor:
    """Return the map [h, w] of class c for x [1, 3, H, W] and a module of the model."""
    A, g = activation_and_gradient(model, x, layer, c)
    S = torch.zeros_like(A[0])
    for k in range(len(A)):
        S = S + g[k].relu() * A[k]
    return S.relu()


def layer_cam_of_layers(
    model: nn.Module, x: Tensor, layers: Sequence[nn.Module], c: int, scaled: int = 2, gamma: float = 2.0
) -> Tensor:
    """Return the fused map [h, w] of layers, fine to coarse, at the resolution of the finest layer.

    Every map is first divided by its own maximum, so that all maps have the same scale. The maps of the first `scaled`
    layers are then scaled by tanh.
    """
    maps = [layer_cam(model, x, layer, c) for layer in layers]
    fused = torch.zeros_like(maps[0])
    for level, S in enumerate(maps):
        M = S / S.max() if S.max() > 0 else S
        if level < scaled:
            M = torch.tanh(gamma * M)  # eq. 9
        fused = torch.maximum(fused, resize(M, (fused.shape[0], fused.shape[1])))
    return fused
