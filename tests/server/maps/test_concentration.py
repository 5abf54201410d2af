"""Concentration of a map: definitions, maps with known values, and warnings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

from camserve_server.maps import concentration
from camserve_server.models.model import Model
from camserve_server.rows import resize_minmax
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
    """Return the most concentrated map of a layer of grid × grid positions: one position, resized."""
    A = torch.zeros(1, 1, grid, grid)
    A[0, 0, grid // 2, grid // 2] = 1
    return torch.nn.functional.interpolate(A, (side, side), mode="bilinear")[0, 0]


def test_metrics_agree_with_scipy_and_the_lorenz_curve(model: Model) -> None:
    S = noise(*SIZE).sigmoid()
    result = explained(model, noise(3, *SIZE), S, [1], [metric("entropy"), metric("top-decile-mass")])
    ours = [score.value for score in result.scores[0]]
    values = np.sort(S.double().numpy().ravel())
    lorenz = np.interp(0.9, np.linspace(0, 1, values.size + 1), np.append(0, values.cumsum()) / values.sum())
    assert ours == pytest.approx([scipy_entropy(values) / math.log(values.size), 1 - lorenz])


def test_maps_with_known_values() -> None:
    for even in (torch.ones(SIZE), torch.full((7, 3), 0.3), torch.zeros(SIZE)):
        assert (concentration.entropy(even), concentration.top_decile_mass(even)) == pytest.approx((1, 0.1))
    assert (concentration.entropy(single()), concentration.top_decile_mass(single())) == (0, 1)
    assert concentration.top_decile_mass(torch.ones(1, 1)) == pytest.approx(0.1)
    tenth = (torch.arange(100) < 10).float().view(10, 10)
    assert (concentration.entropy(tenth), concentration.top_decile_mass(tenth)) == pytest.approx((0.5, 1))
    # Uniform random pixels have an entropy of log N − (log 2 − ½). Those above 0.9 have 1 − 0.9² of the mass.
    chance = torch.rand(224, 224, generator=torch.Generator().manual_seed(0))
    assert concentration.entropy(chance) == pytest.approx(1 - (math.log(2) - 0.5) / math.log(224**2), abs=1e-3)
    assert concentration.top_decile_mass(chance) == pytest.approx(0.19, abs=2e-3)


def test_even_and_concentrated_maps_get_a_warning(model: Model) -> None:
    nearly_even = 0.9 + 0.1 * torch.rand(SIZE, generator=torch.Generator().manual_seed(0))
    few = torch.where(noise(*SIZE) > 2.5, 1.0, 1e-4)
    assert 4 < int((few == 1).sum()) < 20
    for S, text in [
        (torch.full(SIZE, 0.5), "degenerate: the map is constant"),
        (nearly_even, "degenerate: the map is nearly even and does not distinguish parts of the image"),
        (few, "degenerate: the map is concentrated in a few pixels, which is typical of noisy gradients"),
        (single(), "degenerate: the map is concentrated in a few pixels, which is typical of noisy gradients"),
    ]:
        (warning,) = explained(model, noise(3, *SIZE), S).warnings[0]
        assert warning.startswith(text)
    assert not explained(model, noise(3, *SIZE), noise(*SIZE).sigmoid()).warnings[0]


@pytest.mark.parametrize(("grid", "side"), [(7, 224), (14, 224), (12, 384), (4, 32)])
def test_peak_of_one_position_gets_no_warning(grid: int, side: int) -> None:
    assert concentration.degenerate_warnings(peak(grid, side)) == ()


@pytest.mark.parametrize(("method", "warned"), [("fake-cam", True), ("random", False), ("center-gaussian", False)])
def test_warnings_of_controls(model: Model, method: str, warned: bool) -> None:
    assert bool(explained(model, noise(3, *SIZE), call(model, method)).warnings[0]) == warned


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (64, 64), (37, 29)])
def test_warnings_use_the_values_of_the_metrics(size: tuple[int, int]) -> None:
    """Warnings are computed with NumPy, metrics with torch."""
    for S in (noise(*size).abs(), noise(*size).abs() ** 8, torch.zeros(size), torch.ones(size)):
        values = S.numpy().astype(np.float64).ravel()
        assert concentration._entropy(values) == pytest.approx(concentration.entropy(S), abs=1e-12)
        assert concentration._top_decile_mass(values) == pytest.approx(concentration.top_decile_mass(S), abs=1e-12)


@pytest.mark.parametrize("size", [(20, 20), (64, 64), (224, 224), (51, 17)])
def test_bounds_of_the_top_decile_mass_hold_and_are_close(size: tuple[int, int]) -> None:
    for power in (0.1, 1, 4, 16):
        for S in (noise(*size).abs() ** power, resize_minmax(noise(1, 7, 7).abs() ** power, size)[0]):
            exact = concentration.top_decile_mass(S)
            least, most = concentration._bounds_of_top_decile_mass(S.numpy().ravel())
            assert least <= exact <= most
            if size[1] % concentration.SAMPLE_STEP:  # otherwise, the sample is one column
                assert most - least < 0.35 * exact
    for flat in (torch.zeros(size), torch.ones(size), torch.full(size, torch.inf)):
        least, most = concentration._bounds_of_top_decile_mass(flat.numpy().ravel())
        assert least <= 0.1 <= most


def test_fast_decision_about_warnings_is_that_of_the_exact_values() -> None:
    """Maps around both thresholds: the bounds are not sharp enough there, so the exact values decide."""
    chance = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    for even in torch.linspace(0, 3, 40):
        S = chance + even
        warned = concentration.top_decile_mass(S) < concentration.MIN_TOP_DECILE_MASS
        assert bool(concentration.degenerate_warnings(S)) == warned
    for power in torch.linspace(1, 60, 40):
        S = chance**power
        assert bool(concentration.degenerate_warnings(S)) == (concentration.entropy(S) < concentration.MIN_ENTROPY)


def test_lower_bound_of_the_entropy_holds() -> None:
    for size in ((4, 5), (64, 64)):
        for power in (0.1, 1, 4, 16):
            values = (noise(*size).abs() ** power).numpy().astype(np.float64).ravel()
            top = concentration._top_decile_mass(values)
            assert concentration._least_entropy(top, len(values)) <= concentration._entropy(values) + 1e-12
    spike = np.full(4096, 1e-9)
    spike[0] = 1
    assert concentration._least_entropy(concentration._top_decile_mass(spike), 4096) < 0.01
