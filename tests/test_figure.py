"""`make figure` and `make pictures` with few methods: their images, and that they stop their server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import skimage
from numpy.typing import NDArray

from tests.processes import completed, environment
from tests.test_demo import children, mark

FIGURE = Path(__file__).parent.parent / "examples" / "figure.py"
pytestmark = pytest.mark.slow


def figure(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return completed([sys.executable, FIGURE, "--out", out, *arguments], env=environment(**variables))


def pixels(path: Path) -> NDArray[np.float64]:
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float64)


def test_figure_has_a_row_of_maps_with_titles(tmp_path: Path) -> None:
    marker = mark()
    arguments = ("--photographs", "chelsea", "--methods", "grad-cam", "occlusion")
    ran = figure(tmp_path, *arguments, CAMSERVE_TEST_MARKER=marker)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert children(marker) == set()
    assert [path.name for path in tmp_path.iterdir()] == ["figure.jpg"]

    drawn = pixels(tmp_path / "figure.jpg")
    tile, gap, head, label = 160, 4, 30, 112
    height = round(tile * 300 / 451)
    assert drawn.shape == (head + height + gap, label + 3 * (tile + gap), 3)
    tiles = [drawn[head : head + height, left : left + tile] for left in range(label, drawn.shape[1], tile + gap)]
    with PIL.Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png") as chelsea:
        small = np.asarray(chelsea.convert("RGB").resize((tile, height), PIL.Image.Resampling.LANCZOS), np.float64)
    assert abs(tiles[0] - small).mean() < 10, "the first tile is the upright photograph"
    assert all(abs(each - small).mean() > 15 for each in tiles[1:]), "the others show maps over it"
    assert abs(tiles[1] - tiles[2]).mean() > 15, "the two maps differ"

    dark = drawn.min(axis=2) < 100
    assert dark[head:, :label].any(), "the class is at the left"
    titled = [dark[:head, left : left + tile].any() for left in range(label, drawn.shape[1], tile + gap)]
    assert titled == [False, True, True]


def test_single_images_have_the_names_of_their_methods(tmp_path: Path) -> None:
    ran = figure(tmp_path, "--single", "--methods", "cam", "grad-cam++")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cam.jpg", "grad-cam++.jpg"]
    assert pixels(tmp_path / "cam.jpg").shape == (200, 300, 3)


def test_method_that_the_network_cannot_serve_is_an_error(tmp_path: Path) -> None:
    ran = figure(tmp_path, "--photographs", "coffee", "--methods", "raw-attention")
    assert ran.returncode == 1
    assert "self-attention" in ran.stdout
    assert not [*tmp_path.iterdir()]
