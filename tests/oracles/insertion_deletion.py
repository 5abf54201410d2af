"""RISE: Randomized Input Sampling for Explanation of Black-box Models (insertion and deletion).

Vitali Petsiuk, Abir Das, Kate Saenko, 2018, arXiv:1806.07421, with the settings of Poly-CAM, arXiv:2204.13359.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class InsertionDeletion:
    """Probabilities of both curves, [steps] for auc "mean" or [steps + 1] for "trapezoid", and their areas."""

    insertion: Tensor
    deletion: Tensor
    insertion_auc: float
    deletion_auc: float


def gaussian_blur(x: Tensor, radius: int = 5, sigma: float = 5.0) -> Tensor:
    """Blur x [1, 3, H, W] with 2 · radius + 1 pixels. The border is reflected without repeating the edge."""
    padded = F.pad(x, (radius,) * 4, mode="reflect")
    g = [math.exp(-(t**2) / (2 * sigma**2)) for t in range(-radius, radius + 1)]
    blurred = torch.zeros_like(x)
    for i in range(2 * radius + 1):
        for j in range(2 * radius + 1):
            blurred += g[i] * g[j] / sum(g) ** 2 * padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
    return blurred


def falling_order(saliency: Tensor) -> list[int]:
    """Return the flat pixel indices of a map [H, W], most salient first. Equal values: the higher index first."""
    values = saliency.flatten().tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], -i))


@torch.no_grad()
def insertion_deletion(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    saliency: Tensor,
    c: int,
    steps: int | None = None,
    baseline: Literal["blur", "black", "mean"] = "blur",
    auc: Literal["mean", "trapezoid"] = "mean",
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> InsertionDeletion:
    """Return both curves of class c for a normalised x [1, 3, H, W] and a map [H, W]. `steps` is 224 by default."""
    steps = 224 if steps is None else steps
    if baseline == "blur":
        ground = gaussian_blur(x)
    elif baseline == "black":  # The pixel value 0. Only this case uses mean and std.
        ground = (-torch.tensor(mean, dtype=x.dtype) / torch.tensor(std, dtype=x.dtype)).view(1, 3, 1, 1).expand_as(x)
    elif baseline == "mean":
        ground = torch.zeros_like(x)
    else:
        raise ValueError(f"baseline: {baseline!r} is none of blur, black, mean")
    order = falling_order(saliency)
    chunk = math.ceil(len(order) / steps)
    curves: list[list[float]] = []
    for start, end in ((ground, x), (x, ground)):
        row = start.clone()
        curve = [torch.softmax(model(row)[0], dim=0)[c].item()] if auc == "trapezoid" else []
        for step in range(steps):
            for pixel in order[step * chunk : (step + 1) * chunk]:
                i, j = divmod(pixel, x.shape[3])
                row[0, :, i, j] = end[0, :, i, j]
            curve.append(torch.softmax(model(row)[0], dim=0)[c].item())
        curves.append(curve)
    areas = [sum(curve) / len(curve) for curve in curves]
    if auc == "trapezoid":
        areas = [(sum(curve) - curve[0] / 2 - curve[-1] / 2) / steps for curve in curves]
    return InsertionDeletion(torch.tensor(curves[0]), torch.tensor(curves[1]), areas[0], areas[1])
