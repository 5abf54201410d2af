"""`make figure` and `make pictures`, with few methods: what they draw, and that no server is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import skimage
from numpy.typing import NDArray

from tests.test_demo import servers

FIGURE = Path(__file__).parent.parent / "examples" / "figure.py"
pytestmark = pytest.mark.slow


def figure(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FIGURE), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def pixels(path: Path) -> NDArray[np.float64]:
    with PIL.Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), np.float64)


def test_the_figure_has_a_row_of_maps_with_titles(tmp_path: Path) -> None:
    before = servers()
    ran = figure(tmp_path, "--photographs", "chelsea", "--methods", "grad-cam", "occlusion")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert servers() <= before
    assert [path.name for path in tmp_path.iterdir()] == ["figure.jpg"]

    drawn = pixels(tmp_path / "figure.jpg")
    tile, gap, head, label = 160, 4, 30, 112
    height = round(tile * 300 / 451)
    assert drawn.shape == (head + height + gap, label + 3 * (tile + gap), 3)
    tiles = [drawn[head : head + height, left : left + tile] for left in range(label, drawn.shape[1], tile + gap)]
    with PIL.Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png") as chelsea:
        small = np.asarray(chelsea.convert("RGB").resize((tile, height), PIL.Image.Resampling.LANCZOS), np.float64)
    assert abs(tiles[0] - small).mean() < 10, "the photograph first, upright"
    assert all(abs(one - small).mean() > 15 for one in tiles[1:]), "then maps over it"
    assert abs(tiles[1] - tiles[2]).mean() > 15, "each its own"

    dark = drawn.min(axis=2) < 100
    assert dark[head:, :label].any(), "the class at the left"
    titled = [dark[:head, left : left + tile].any() for left in range(label, drawn.shape[1], tile + gap)]
    assert titled == [False, True, True]


def test_single_pictures_have_the_names_of_their_methods(tmp_path: Path) -> None:
    ran = figure(tmp_path, "--single", "--methods", "cam", "grad-cam++")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cam.jpg", "grad-cam++.jpg"]
    assert pixels(tmp_path / "cam.jpg").shape == (200, 300, 3)


def test_what_the_network_cannot_serve_is_an_error(tmp_path: Path) -> None:
    ran = figure(tmp_path, "--photographs", "coffee", "--methods", "raw-attention")
    assert ran.returncode == 1
    assert "self-attention" in ran.stdout
    assert not [*tmp_path.iterdir()]
