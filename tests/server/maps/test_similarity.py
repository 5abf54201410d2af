"""Similarity of maps, against SciPy and scikit-image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from skimage.feature import hog as skimage_hog
from skimage.metrics import structural_similarity
from torch import Tensor

from camserve_server.maps.similarity import hog, oriented_gradients, spearman, ssim
from tests.support import noise

SIZES = [(64, 64), (90, 70), (224, 224)]


def smooth(size: tuple[int, int], seed: int) -> Tensor:
    """Return a map like that of a coarse layer. Its zeros are ties."""
    up = torch.nn.functional.interpolate(noise(1, 1, 7, 7, seed=seed), size, mode="bilinear")[0, 0].relu()
    return up / up.max()


def rough(size: tuple[int, int], seed: int) -> Tensor:
    """Return a map of noise."""
    return noise(*size, seed=seed).abs().div(6).clamp(0, 1)


pairs = pytest.mark.parametrize(
    ("a", "b"),
    [(make(size, 1), other(size, 2)) for size in SIZES for make in (smooth, rough) for other in (smooth, rough)],
)


@pairs
def test_spearman_agrees_with_scipy(a: Tensor, b: Tensor) -> None:
    assert spearman(a, b) == pytest.approx(float(spearmanr(a.flatten(), b.flatten()).statistic), abs=1e-9)


@pairs
def test_ssim_agrees_with_scikit_image(a: Tensor, b: Tensor) -> None:
    theirs = structural_similarity(a.double().numpy(), b.double().numpy(), data_range=1.0)
    assert ssim(a, b) == pytest.approx(theirs, abs=1e-9)


@pairs
def test_hog_agrees_with_scikit_image(a: Tensor, b: Tensor) -> None:
    theirs = [skimage_hog((S.double() / S.max()).numpy(), pixels_per_cell=(16, 16)) for S in (a, b)]
    assert oriented_gradients(a).numpy() == pytest.approx(theirs[0], abs=1e-6)  # scikit-image sums in float32.
    assert hog(a, b) == pytest.approx(float(torch.corrcoef(torch.tensor(np.array(theirs)))[0, 1]), abs=1e-6)


@pytest.mark.parametrize("measure", [spearman, ssim, hog])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 7), (29, 37), (48, 20)])
def test_similarity_of_small_maps(measure: Callable[[Tensor, Tensor], float], size: tuple[int, int]) -> None:
    a, b = rough(size, 1), rough(size, 2)
    assert measure(a, a) == pytest.approx(1)
    assert -1 <= measure(a, b) <= 1
    assert measure(a, b) == pytest.approx(measure(b, a))


@pytest.mark.parametrize("measure", [spearman, hog])
def test_constant_map_is_similar_only_to_a_constant_map(measure: Callable[[Tensor, Tensor], float]) -> None:
    zeros = torch.zeros(64, 64)
    assert measure(zeros, zeros) == 1
    assert measure(zeros, smooth((64, 64), 1)) == 0
