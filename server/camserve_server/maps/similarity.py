"""Similarity of two maps, as in Sanity Checks for Saliency Maps, with the definitions of scikit-image.

Adebayo et al. 2018, arXiv:1810.03292. All three measures are 1 for equal maps and about 0 for unrelated maps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 7  # Side of the window of SSIM in pixels.
K1, K2 = 0.01, 0.03  # Constants of SSIM, for values in [0, 1].
CELL, BLOCK, ORIENTATIONS = 16, 3, 9  # HOG: pixels per side of a cell, cells per side of a block, bins of 20°.
CLIP = 0.2  # Upper limit of L2-Hys.
EPSILON = 1e-5  # Keeps the norm of an empty block above zero.


def spearman(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of the pixels. Equal values get the mean of their ranks.

    Args:
        a: Map [H, W] in [0, 1].
        b: Map [H, W] in [0, 1].

    Returns:
        The correlation, in [−1, 1]. If only one map is constant, it is 0. If both are constant, it is 1.
    """
    return _correlation(_ranks(a), _ranks(b))


def ssim(a: Tensor, b: Tensor) -> float:
    """Return the structural similarity: Wang et al. 2004, eq. 13, mean over all windows of 7×7 inside the maps.

    Args:
        a: Map [H, W] in [0, 1].
        b: Map [H, W] in [0, 1].

    Returns:
        The structural similarity, in [−1, 1]. Smaller maps use the largest odd window that fits.
    """
    a, b = a.double(), b.double()
    sides = [min(WINDOW, side - 1 + side % 2) for side in a.shape]
    pixels = sides[0] * sides[1]
    stacked = torch.stack([a, b, a * a, b * b, a * b])[:, None]
    mean_a, mean_b, aa, bb, ab = F.avg_pool2d(stacked, sides, stride=1)[:, 0]
    sample = pixels / max(1, pixels - 1)
    var_a, var_b, cov = (sample * (m - n) for m, n in [(aa, mean_a**2), (bb, mean_b**2), (ab, mean_a * mean_b)])
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * cov + K2**2) / (var_a + var_b + K2**2)
    return float((luminance * structure).mean())


def hog(a: Tensor, b: Tensor) -> float:
    """Return the correlation of the histograms of oriented gradients: Dalal, Triggs 2005.

    Args:
        a: Map [H, W] in [0, 1].
        b: Map [H, W] in [0, 1].

    Returns:
        The correlation, in [−1, 1]. If only one histogram is constant, it is 0. If both are constant, it is 1.
    """
    return _correlation(oriented_gradients(a), oriented_gradients(b))


def oriented_gradients(S: Tensor) -> Tensor:
    """Return the histograms of oriented gradients of a map, normalised by L2-Hys for each block of 3×3 cells.

    Cells have 16×16 pixels, or fewer if the map would otherwise have fewer than 3×3 cells.

    Args:
        S: Map [H, W], ≥ 0. It is scaled to a maximum of 1.

    Returns:
        The histograms of all blocks as one vector.
    """
    S = S.double()
    S = S / S.max() if S.max() > 0 else S
    dy, dx = torch.zeros_like(S), torch.zeros_like(S)
    dy[1:-1], dx[:, 1:-1] = S[2:] - S[:-2], S[:, 2:] - S[:, :-2]
    magnitude, degrees = torch.hypot(dx, dy), torch.rad2deg(torch.atan2(dy, dx)) % 180
    h, w = (max(1, min(CELL, side // BLOCK)) for side in S.shape)
    bins = F.one_hot((degrees * ORIENTATIONS / 180).long().clamp(max=ORIENTATIONS - 1), ORIENTATIONS)
    cells = F.avg_pool2d((magnitude[..., None] * bins).permute(2, 0, 1), (h, w))  # [bins, rows, columns]
    rows, columns = (min(BLOCK, side) for side in cells.shape[1:])
    blocks = cells.unfold(1, rows, 1).unfold(2, columns, 1).permute(1, 2, 3, 4, 0).flatten(2)  # [·, ·, values]
    clipped = (blocks / _norm(blocks)).clamp(max=CLIP)
    return (clipped / _norm(clipped)).flatten()


def _norm(blocks: Tensor) -> Tensor:
    return (blocks.square().sum(dim=-1, keepdim=True) + EPSILON**2).sqrt()


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value. Equal values get the mean of their ranks."""
    place: Tensor
    counts: Tensor
    _, place, counts = values.flatten().unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


def _correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation: 0 if only one vector is constant, 1 if both are."""
    a, b = a - a.mean(), b - b.mean()
    norms = float(a.norm()), float(b.norm())
    if not all(norms):
        return float(norms[0] == norms[1])
    return max(-1.0, min(1.0, float(torch.dot(a, b)) / (norms[0] * norms[1])))
