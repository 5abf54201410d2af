"""Oracles with random masks or stepwise masks against torchcam, scikit-image and values by hand, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.transform
import torch
from torch import Tensor

from tests import nets
from tests.oracles.comparison import FixedSamples
from tests.oracles.comparison import relative_gap as gap
from tests.oracles.is_cam import is_cam
from tests.oracles.networks import tiny
from tests.oracles.rise import rise, rise_masks
from tests.oracles.score_cam import score_cam
from tests.oracles.ss_cam import ss_cam

on_sizes = pytest.mark.parametrize("size", [(37, 29), (32, 32)], ids=["odd", "square"])
on_layers = pytest.mark.parametrize("layer", ["r1", "r2", "r3"])


def uniform(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).double()


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


# --- SS-CAM and IS-CAM ---


@pytest.mark.slow
@on_sizes
@on_layers
def test_ss_cam_agrees_with_torchcam_except_for_the_order_of_scaling(size: tuple[int, int], layer: str) -> None:
    from torchcam.methods import SSCAM

    net, x, c = tiny(size)
    (A,) = nets.activations(net, x, [layer])
    noise = 2 * normal(5, len(A), *size)
    with SSCAM(net, layer, input_shape=(3, *size), num_samples=5) as extractor:
        extractor._distrib = FixedSamples(noise)  # type: ignore[assignment]
        net(x)
        (theirs,) = extractor(c, normalized=False)
    ours = ss_cam(net, x, A, c, noise, "torchcam")
    assert gap(ours.map, theirs[0]) < 1e-12
    assert ours.weights[0] > 0  # The dead channel: noise alone has a score, too.
    paper = ss_cam(net, x, A, c, noise)
    assert (gap(paper.map, theirs[0]) > 1e-4) == (layer != "r1")  # Maps of r1 are not upsampled.
    shared = ss_cam(net, x, A, c, noise[:, :1])
    assert gap(shared.map, paper.map) > 1e-4
    assert gap(shared.scores[0], shared.scores[1]) == 0  # Dead and constant channels have the same rows.


@pytest.mark.slow
@on_sizes
@on_layers
def test_is_cam_differs_from_torchcam_which_accumulates_its_steps(size: tuple[int, int], layer: str) -> None:
    from torchcam.methods import ISCAM

    net, x, c = tiny(size)
    (A,) = nets.activations(net, x, [layer])
    with ISCAM(net, layer, input_shape=(3, *size)) as extractor:
        net(x)
        (theirs,) = extractor(c, normalized=False)
    assert gap(is_cam(net, x, A, c, variant="torchcam").map, theirs[0]) < 1e-12
    paper = is_cam(net, x, A, c)
    assert gap(paper.map, theirs[0]) > 1e-3
    assert paper.weights[0] == paper.weights[1]


@on_layers
def test_ss_cam_without_noise_and_is_cam_with_one_step_equal_score_cam(layer: str) -> None:
    net, x, c = tiny((37, 29))
    (A,) = nets.activations(net, x, [layer])
    expected = score_cam(net, x, A, c)
    for ours in (ss_cam(net, x, A, c, torch.zeros(2, 1, 37, 29).double()), is_cam(net, x, A, c, steps=1)):
        assert gap(ours.scores, expected.scores) < 1e-12
        assert gap(ours.map, expected.map) < 1e-12


def test_is_cam_by_hand() -> None:
    """The score is the square of one pixel, so its mean is that of the squares of 1/2 and 1."""
    x = torch.full((1, 3, 2, 2), 2.0)
    A = torch.tensor([[[0.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])
    ours = is_cam(lambda rows: rows[:, 0, 0, 0][:, None] ** 2, x, A, 0, steps=2)
    assert ours.scores.tolist() == [0, (1 + 4) / 2]
    theirs = is_cam(lambda rows: rows[:, 0, 0, 0][:, None] ** 2, x, A, 0, steps=2, variant="torchcam")
    assert theirs.scores.tolist() == [0, (1 + 9) / 2]


# --- RISE ---


@pytest.mark.parametrize(("size", "s"), [((37, 29), 8), ((32, 32), 8), ((32, 32), 7), ((224, 224), 8)])
def test_rise_masks_agree_with_the_authors_except_at_the_border(size: tuple[int, int], s: int) -> None:
    """The masks of the authors are crops of a grid that scikit-image upsampled, with one further cell."""
    cell = [-(-side // s) for side in size]
    grids = (uniform(6, s, s) < 0.5).double()
    shifts = (uniform(6, 2, seed=4) * torch.tensor(cell)).long()
    shifts[0] = 0
    shifts[1] = torch.tensor(cell) - 1
    ours = rise_masks(grids, shifts, size)
    up = [(s + 1) * side for side in cell]
    for n in range(6):
        i, j = shifts[n].tolist()
        edge, reflect = (
            skimage.transform.resize(grids[n].numpy(), up, order=1, mode=mode, anti_aliasing=False)
            for mode in ("edge", "reflect")
        )
        assert gap(ours[n], edge[i : i + size[0], j : j + size[1]]) < 1e-6
        inner = np.zeros(up, dtype=bool)
        inner[cell[0] : -cell[0], cell[1] : -cell[1]] = True
        inside = inner[i : i + size[0], j : j + size[1]]
        assert inside.any()
        assert gap(ours[n].numpy()[inside], reflect[i : i + size[0], j : j + size[1]][inside]) < 1e-6
        assert gap(edge, reflect) > 0.1
    assert 0 <= ours.min() < ours.max() < 1 + 1e-12
    assert 0.3 < ours.mean() < 0.7


def test_rise_is_the_mean_of_masks_weighted_by_probability() -> None:
    net, x, c = tiny((37, 29))
    masks = rise_masks((uniform(40, 8, 8) < 0.5).double(), (uniform(40, 2, seed=4) * 4).long(), (37, 29))
    with torch.no_grad():
        probabilities = torch.softmax(net(x * masks[:, None]), dim=1)[:, c]
    ours = rise(net, x, c, masks, 0.5)
    assert gap(ours, (probabilities @ masks.flatten(1)).reshape(37, 29) / 20) < 1e-12
    assert gap(rise(net, x, c, masks, 0.1), 5 * ours) < 1e-12


def test_rise_finds_the_only_pixel_with_an_effect() -> None:
    """Over all 512 masks of 3×3, the map is the expected probability, given that a pixel is shown."""
    x = torch.ones(1, 3, 3, 3).double()
    masks = torch.tensor([[(n >> bit) & 1 for bit in range(9)] for n in range(512)]).double().reshape(512, 3, 3)
    ours = rise(lambda rows: torch.stack((4 * rows[:, 0, 1, 2], 0 * rows[:, 0, 0, 0]), 1), x, 0, masks, 0.5)
    with_it, without = torch.sigmoid(torch.tensor([4.0, 0.0])).tolist()
    expected = torch.full((3, 3), (with_it + without) / 2)
    expected[1, 2] = with_it
    assert gap(ours, expected) < 1e-6
