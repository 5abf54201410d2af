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
    """Result of Poly-CAM.

    Attributes:
        map: Map [H, W] of the finest level.
        levels: Maps [H, W], coarse to fine.
        channel_weights: Weights [K] of each level, coarse to fine. Empty for a skipped level.
    """

    map: Tensor
    levels: list[Tensor]
    channel_weights: list[Tensor]


def resize(M: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize M [h, w] to [H, W]: bilinear, corners not aligned, without antialias."""
    return F.interpolate(M[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def minmax(M: Tensor) -> Tensor:
    lo, hi = M.min(), M.max()
    return torch.zeros_like(M) if hi <= lo else (M - lo) / (hi - lo)


def percentile_scale(M: Tensor) -> Tensor:
    """Scale as the official code: between two percentiles, but divided by the upper one only."""
    lo, hi = (torch.tensor(np.percentile(M.numpy(), q), dtype=M.dtype) for q in (0.1, 99.9))
    return ((M - lo) / hi.clamp(min=1e-12)).clamp(0, 1)


def scaled(M: Tensor, size: tuple[int, int], variant: Variant) -> Tensor:
    """Return u(up(M)) of the paper or up(u(M)) of the official code, [H, W] in [0, 1], for masks and levels."""
    if variant == "official":
        return resize(percentile_scale(M), size)
    if M.min() == M.max():  # After resizing, rounding would look like contrast.
        return torch.zeros(size, dtype=M.dtype)
    return minmax(resize(M, size))


def probability(model: Callable[[Tensor], Tensor], row: Tensor, c: int) -> Tensor:
    """Return f_c of a row [1, 3, H, W]. A model with one logit uses the sigmoid."""
    y = model(row)[0]
    return torch.sigmoid(y[0]) if len(y) == 1 else torch.softmax(y, dim=0)[c]


def channel_weight(model: Callable[[Tensor], Tensor], x: Tensor, p: Tensor, M: Tensor, c: int, weights: str) -> Tensor:
    """Return w_k for p = f_c(x) and the mask M [H, W] of channel k."""
    if weights == "p":  # eq. 4, with f_c(X_b) = 0
        return probability(model, x * M, c)
    if weights == "m":  # eq. 5
        return (p - probability(model, x * (1 - M), c)).relu()
    if weights == "pm":  # eq. 6
        return (p + probability(model, x * M, c) - probability(model, x * (1 - M), c)).relu()
    raise ValueError(f"weights: {weights!r} is none of p, m, pm")


def lnorm(S: Tensor, coarser: tuple[int, int], variant: Variant) -> Tensor:
    """Divide S [h, w] by its local mean (eq. 1). Blocks are the positions of the coarser level."""
    pooled = resize(S, coarser) if variant == "official" else F.adaptive_avg_pool2d(S[None, None], coarser)[0, 0]
    return S / resize(pooled, (S.shape[0], S.shape[1])).clamp(min=1e-12)


def channel_weights(
    model: Callable[[Tensor], Tensor], x: Tensor, A: Tensor, c: int, weights: str, variant: Variant
) -> Tensor:
    """Return w_l [K] for A [K, h, w], with one or two forward passes of one row per channel."""
    p = probability(model, x, c)
    w = torch.zeros(len(A), dtype=A.dtype)
    for k in range(len(A)):
        w[k] = channel_weight(model, x, p, scaled(A[k], (x.shape[2], x.shape[3]), variant), c, weights)
    return w


def compose(activations: list[Tensor], w: list[Tensor], size: tuple[int, int], variant: Variant) -> list[Tensor]:
    """Return the levels [H, W], coarse to fine, of activations [K, h, w], fine to coarse, and w [K], coarse to fine."""
    P: Tensor | None = None
    levels: list[Tensor] = []
    for A, w_l in zip(reversed(activations), w, strict=True):
        if variant == "paper" and P is not None and A.shape[1:] == P.shape:
            levels.append(levels[-1])
            continue
        S = torch.zeros_like(A[0])
        for k in range(len(A)):
            S = S + w_l[k] * A[k]
        S = S.relu()  # eq. 2
        if P is None:
            P = S  # eq. 3, l = L
        else:
            coarser = (P.shape[0], P.shape[1])
            P = lnorm(S, coarser, variant) * resize(P, (S.shape[0], S.shape[1]))  # eq. 3, l < L
        levels.append(scaled(P, size, variant))
    return levels


@torch.no_grad()
def poly_cam(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    activations: list[Tensor],
    c: int,
    weights: Literal["p", "m", "pm"] = "pm",
    variant: Variant = "paper",
) -> PolyCam:
    """Return the maps of class c for x [1, 3, H, W] and its activations [K, h, w], fine to coarse."""
    if variant not in ("paper", "official"):
        raise ValueError(f"variant: {variant!r} is neither paper nor official")
    w: list[Tensor] = []
    for level, A in reversed(list(enumerate(activations))):
        coarser = activations[level + 1] if level + 1 < len(activations) else None
        if variant == "paper" and coarser is not None and A.shape[1:] == coarser.shape[1:]:
            w.append(torch.zeros(0, dtype=A.dtype))  # A level of the same size as the coarser one has no effect.
        else:
            w.append(channel_weights(model, x, A, c, weights, variant))
    levels = compose(activations, w, (x.shape[2], x.shape[3]), variant)
    return PolyCam(levels[-1], levels, w)
