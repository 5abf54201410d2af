"""Backward recursive Class Activation Map refinement for high resolution saliency map (Poly-CAM).

Alexandre Englebert, Olivier Cornu, Christophe De Vleeschouwer, 2022, arXiv:2204.13359.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Variant = Literal["paper", "official"]


@dataclass
class PolyCam:
    """map [H, W]; levels, coarse to fine, each [H, W]; channel_weights, coarse to fine, each [K] ([0] where skipped)."""

    map: Tensor
    levels: list[Tensor]
    channel_weights: list[Tensor]


def resize(M: Tensor, size: tuple[int, int]) -> Tensor:
    """M [h, w] → [H, W], bilinear, corners not aligned, no antialias."""
    return F.interpolate(M[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def minmax(M: Tensor) -> Tensor:
    lo, hi = M.min(), M.max()
    return torch.zeros_like(M) if hi <= lo else (M - lo) / (hi - lo)


def percentile_scale(M: Tensor) -> Tensor:
    """The official code's scaling: between two percentiles, but divided by the upper one alone."""
    lo, hi = (torch.tensor(np.percentile(M.numpy(), q), dtype=M.dtype) for q in (0.1, 99.9))
    return ((M - lo) / hi.clamp(min=1e-12)).clamp(0, 1)


def unit_mask(a: Tensor, size: tuple[int, int], variant: Variant) -> Tensor:
    """u(up(A_k)) of the paper, up(u(A_k)) of the official code: a [h, w] → [H, W] in [0, 1]."""
    if variant == "official":
        return resize(percentile_scale(a), size)
    if a.min() == a.max():  # before upsampling: the rounding of a bilinear resize would look like contrast
        return torch.zeros(size, dtype=a.dtype)
    return minmax(resize(a, size))


def probability(model: Callable[[Tensor], Tensor], row: Tensor, c: int) -> Tensor:
    """row [1, 3, H, W] → f_c(row), a scalar; a model of one logit is read through a sigmoid."""
    y = model(row)[0]
    return torch.sigmoid(y[0]) if len(y) == 1 else torch.softmax(y, dim=0)[c]


def channel_weight(model: Callable[[Tensor], Tensor], x: Tensor, M: Tensor, c: int, weights: str) -> Tensor:
    """w_k from the mask M [H, W] of channel k."""
    if weights == "p":  # eq. 4, with f_c(X_b) = 0
        return probability(model, x * M, c)
    if weights == "m":  # eq. 5
        return (probability(model, x, c) - probability(model, x * (1 - M), c)).relu()
    if weights == "pm":  # eq. 6
        shown, hidden = probability(model, x * M, c), probability(model, x * (1 - M), c)
        return (probability(model, x, c) + shown - hidden).relu()
    raise ValueError(f"weights: {weights!r} is none of p, m, pm")


def lnorm(S: Tensor, coarser: tuple[int, int], variant: Variant) -> Tensor:
    """eq. 1: S [h, w] over its own local mean, on blocks that are the pixels of the coarser level."""
    if variant == "official":
        pooled = resize(S, coarser)
    else:
        pooled = F.adaptive_avg_pool2d(S[None, None], coarser)[0, 0]
    return S / resize(pooled, (S.shape[0], S.shape[1])).clamp(min=1e-12)


@torch.no_grad()
def poly_cam(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    activations: list[Tensor],
    c: int,
    weights: Literal["p", "m", "pm"] = "pm",
    variant: Variant = "paper",
) -> PolyCam:
    """model [N, 3, H, W] → logits; x [1, 3, H, W]; activations, fine to coarse, each [K, h, w]."""
    if variant not in ("paper", "official"):
        raise ValueError(f"variant: {variant!r} is neither paper nor official")
    size = (x.shape[2], x.shape[3])
    P: Tensor | None = None
    levels: list[Tensor] = []
    channel_weights: list[Tensor] = []
    for A in reversed(activations):
        if variant == "paper" and P is not None and A.shape[1:] == P.shape:
            levels.append(levels[-1])
            channel_weights.append(torch.zeros(0, dtype=A.dtype))
            continue
        w = torch.zeros(len(A), dtype=A.dtype)
        S = torch.zeros_like(A[0])
        for k in range(len(A)):
            w[k] = channel_weight(model, x, unit_mask(A[k], size, variant), c, weights)
            S = S + w[k] * A[k]
        S = S.relu()  # eq. 2
        if P is None:
            P = S  # eq. 3, l = L
        else:
            coarser = (P.shape[0], P.shape[1])
            P = lnorm(S, coarser, variant) * resize(P, (S.shape[0], S.shape[1]))  # eq. 3, l < L
        levels.append(resize(percentile_scale(P), size) if variant == "official" else minmax(resize(P, size)))
        channel_weights.append(w)
    return PolyCam(levels[-1], levels, channel_weights)
