"""Ablation-CAM: Visual Explanations for Deep Convolutional Network via Gradient-free Localization.

Saurabh Desai, Harish G. Ramaswamy, 2020, WACV.

grad-cam 1.5.7 agrees if the smallest activation of the layer is exactly 0, up to the float32 precision of its scores.
Otherwise it does not set a channel to zero, but to the smallest activation minus 1e7.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class AblationCam:
    """Result of Ablation-CAM.

    Attributes:
        map: Map [h, w] at the resolution of the layer, not scaled.
        scores: Logits [K] with each channel set to zero.
        weights: Weights [K].
    """

    map: Tensor
    scores: Tensor
    weights: Tensor


@torch.no_grad()
def ablation_cam(model: nn.Module, x: Tensor, layer: nn.Module, c: int) -> AblationCam:
    """Return the map of class c for x [1, 3, H, W]. The model calls the module `layer` once."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    try:
        y = model(x)[0, c]
    finally:
        handle.remove()
    A = seen[0][0]
    scores = torch.zeros(len(A), dtype=A.dtype)
    w = torch.zeros(len(A), dtype=A.dtype)
    S = torch.zeros_like(A[0])
    for k in range(len(A)):
        ablated = A.clone()
        ablated[k] = 0
        handle = layer.register_forward_hook(lambda module, args, output, ablated=ablated: ablated[None])
        try:
            scores[k] = model(x)[0, c]
        finally:
            handle.remove()
        w[k] = (y - scores[k]) / y
        S = S + w[k] * A[k]
    return AblationCam(S.relu(), scores, w)
