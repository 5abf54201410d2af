"""Opti-CAM: Optimizing saliency maps for interpretability.

Hanwei Zhang, Felipe Torres, Ronan Sicre, Yannis Avrithis, Stephane Ayache, 2024, CVIU 248:104101, arXiv:2301.07002.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class OptiCam:
    """Result of Opti-CAM.

    Attributes:
        saliency: Map [H, W] in [0, 1].
        u: Variable [K] of the map.
        weights: softmax(u) [K].
        objective: Objective of each completed step.
        stopped: True if the stopping rule ended the ascent.
    """

    saliency: Tensor
    u: Tensor
    weights: Tensor
    objective: list[float]
    stopped: bool


def saliency_map(A: Tensor, u: Tensor, size: tuple[int, int], norm: str) -> Tensor:
    """Return n(up(S(u))) [H, W] of A [K, h, w] and u [K]."""
    w = torch.softmax(u, dim=0)
    S = torch.zeros_like(A[0])
    for k in range(len(A)):
        S = S + w[k] * A[k]  # eq. 8
    S = F.interpolate(S[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    if norm == "range":
        return (S - S.min()) / (S.max() - S.min())
    if norm == "max":
        return S / S.max()
    if norm == "sigmoid":
        return 1 / (1 + torch.exp(-S))
    raise ValueError(f"norm: {norm!r} is none of range, max, sigmoid")


def opti_cam(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    activation: Tensor,
    c: int,
    *,
    relu: bool = True,
    norm: Literal["range", "max", "sigmoid"] = "range",
    mask_space: Literal["raw", "normalised"] = "raw",
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    objective: Literal["mask", "diff"] = "mask",
    steps: int = 100,
    rate: float = 0.1,
    stop: Literal["official"] | None = None,
) -> OptiCam:
    """Return the map of class c for the input x [1, 3, H, W] of the model and its activation [K, h, w].

    `mean` and `std` normalised the pixels in [0, 1] to x. mask_space "raw" masks these pixels. By default, x contains
    the pixels.
    """
    size = (x.shape[2], x.shape[3])
    A = activation.detach()
    A = A.relu() if relu else A
    u = torch.full((len(A),), 0.5, dtype=A.dtype, requires_grad=True)
    mu = torch.tensor(mean, dtype=x.dtype).view(1, 3, 1, 1)
    sigma = torch.tensor(std, dtype=x.dtype).view(1, 3, 1, 1)
    with torch.no_grad():
        y = model(x)[0, c]
        S0 = A.mean(0)
        if S0.min() == S0.max():  # All maps are constant, and n would divide by zero.
            return OptiCam(torch.zeros(size, dtype=x.dtype), u.detach(), torch.softmax(u, 0), [], stopped=False)

    def masked(s: Tensor) -> Tensor:
        if mask_space == "normalised":
            return x * s
        if mask_space == "raw":
            return ((x * sigma + mu) * s - mu) / sigma
        raise ValueError(f"mask_space: {mask_space!r} is neither raw nor normalised")

    adam = torch.optim.Adam([u], lr=rate)
    history: list[float] = []
    last_loss = float("inf")
    for step in range(steps):
        s = saliency_map(A, u, size, norm)
        y_masked = model(masked(s))[0, c]
        if objective == "mask":  # eq. 9 and 10
            loss = y - y_masked
            history.append(y_masked.item())
        elif objective == "diff":  # eq. 19
            loss = (y - y_masked).abs()
            history.append(-loss.item())
        else:
            raise ValueError(f"objective: {objective!r} is neither mask nor diff")
        before = u.detach().clone()
        (u.grad,) = torch.autograd.grad(loss, u)
        adam.step()
        if stop == "official" and step % max(steps // 10, 1) == 0:
            if loss.item() > last_loss:  # Return the map of this step, before its update.
                return OptiCam(s.detach(), before, torch.softmax(before, 0), history, stopped=True)
            last_loss = loss.item()
    with torch.no_grad():
        return OptiCam(saliency_map(A, u, size, norm), u.detach(), torch.softmax(u, 0), history, stopped=False)
