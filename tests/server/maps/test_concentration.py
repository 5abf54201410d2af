"""How a map's mass is spread: definitions, maps whose figures are known, and who is warned of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

from camserve_server.maps import concentration
from camserve_server.models.model import Model
from tests import nets
from tests.support import as_model, call, explained, metric, noise

SIZE = (40, 30)


@pytest.fixture(scope="module")
def model() -> Model:
    return as_model(nets.tiny_cnn(), SIZE)


def single(row: int = 3, column: int = 5) -> Tensor:
    S = torch.zeros(SIZE)
    S[row, column] = 1
    return S


def peak(grid: int, side: int) -> Tensor:
    """The sharpest map that a layer of grid × grid can give: one position of it, resized."""
    A = torch.zeros(1, 1, grid, grid)
    A[0, 0, grid // 2, grid // 2] = 1
    return torch.nn.functional.interpolate(A, (side, side), mode="bilinear")[0, 0]


def test_the_metrics_are_scipys_entropy_and_a_point_of_the_lorenz_curve(model: Model) -> None:
    S = noise(*SIZE).sigmoid()
    result = explained(model, noise(3, *SIZE), S, [1], [metric("entropy"), metric("top-decile-mass")])
    ours = [score.value for score in result.scores[0]]
    values = np.sort(S.double().numpy().ravel())
    lorenz = np.interp(0.9, np.linspace(0, 1, values.size + 1), np.append(0, values.cumsum()) / values.sum())
    assert ours == pytest.approx([scipy_entropy(values) / math.log(values.size), 1 - lorenz])


def test_maps_whose_figures_are_known() -> None:
    for even in (torch.ones(SIZE), torch.full((7, 3), 0.3), torch.zeros(SIZE)):
        assert (concentration.entropy(even), concentration.top_decile_mass(even)) == pytest.approx((1, 0.1))
    assert (concentration.entropy(single()), concentration.top_decile_mass(single())) == (0, 1)
    assert concentration.top_decile_mass(torch.ones(1, 1)) == pytest.approx(0.1)
    tenth = (torch.arange(100) < 10).float().view(10, 10)
    assert (concentration.entropy(tenth), concentration.top_decile_mass(tenth)) == pytest.approx((0.5, 1))
    # Random pixels: q log q of a uniform density is ½ − log 2 below that of an even map; 1 − 0.9² are above 0.9.
    chance = torch.rand(224, 224, generator=torch.Generator().manual_seed(0))
    assert concentration.entropy(chance) == pytest.approx(1 - (math.log(2) - 0.5) / math.log(224**2), abs=1e-3)
    assert concentration.top_decile_mass(chance) == pytest.approx(0.19, abs=2e-3)


def test_who_is_warned_of(model: Model) -> None:
    nearly_even = 0.9 + 0.1 * torch.rand(SIZE, generator=torch.Generator().manual_seed(0))
    few = torch.where(noise(*SIZE) > 2.5, 1.0, 1e-4)
    assert 4 < int((few == 1).sum()) < 20
    for S, said in [
        (torch.full(SIZE, 0.5), "degenerate: the map is constant"),
        (nearly_even, "degenerate: the map is nearly even and does not distinguish parts of the image"),
        (few, "degenerate: the map is concentrated in a few pixels, which is typical of noisy gradients"),
        (single(), "degenerate: the map is concentrated in a few pixels, which is typical of noisy gradients"),
    ]:
        (warning,) = explained(model, noise(3, *SIZE), S).warnings[0]
        assert warning.startswith(said)
    assert not explained(model, noise(3, *SIZE), noise(*SIZE).sigmoid()).warnings[0]


@pytest.mark.parametrize(("grid", "side"), [(7, 224), (14, 224), (12, 384), (4, 32)])
def test_a_sharp_peak_is_no_fault(grid: int, side: int) -> None:
    assert concentration.degenerate_warnings(peak(grid, side)) == ()


@pytest.mark.parametrize(("method", "warned"), [("fake-cam", True), ("random", False), ("center-gaussian", False)])
def test_controls(model: Model, method: str, warned: bool) -> None:
    assert bool(explained(model, noise(3, *SIZE), call(model, method)).warnings[0]) == warned
