"""`make figure` and `make pictures` with few methods: their images, and that they stop their server."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import skimage
from numpy.typing import NDArray

from camserve_server.service.server import Server
from tests.processes import completed, environment
from tests.test_demo import children, mark

# The embedded network with a small input, and with a given batch size, so that the server does not measure it.
MODELS = '[{"name": "lite0", "source": "embedded:efficientnet-lite0", "input_size": [96, 96], "batch_size": 8}]'
FIGURE = Path(__file__).parent.parent / "examples" / "figure.py"
pytestmark = pytest.mark.slow


def figure(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return completed([sys.executable, FIGURE, "--out", out, *arguments], env=environment(**variables))


@pytest.fixture
def figure_in_process(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Return a function that runs examples/figure.py with the shared server, and returns its exit status and output.

    The start of a server with the embedded network takes many seconds of CPU time.
    """
    monkeypatch.syspath_prepend(FIGURE.parent)
    module = importlib.import_module("figure")
    monkeypatch.setattr(module.demo, "serving", lambda log, console: nullcontext(server.address))
    handler = signal.getsignal(signal.SIGTERM)

    def run(out: Path, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["figure.py", "--out", str(out), *arguments])
        return module.main(), capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, handler)


def pixels(path: Path) -> NDArray[np.float64]:
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float64)


def test_figure_has_a_row_of_maps_with_titles(tmp_path: Path) -> None:
    marker = mark()
    arguments = ("--photographs", "chelsea", "--methods", "grad-cam", "occlusion")
    ran = figure(tmp_path, *arguments, CAMSERVE_TEST_MARKER=marker, CAMSERVE_MODELS=MODELS)
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


def test_single_images_have_the_names_of_their_methods(
    tmp_path: Path, figure_in_process: Callable[..., tuple[int, str]]
) -> None:
    status, output = figure_in_process(tmp_path, "--single", "--methods", "cam", "grad-cam++")
    assert status == 0, output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cam.jpg", "grad-cam++.jpg"]
    assert pixels(tmp_path / "cam.jpg").shape == (200, 300, 3)


def test_method_that_the_network_cannot_serve_is_an_error(
    tmp_path: Path, figure_in_process: Callable[..., tuple[int, str]]
) -> None:
    status, output = figure_in_process(tmp_path, "--photographs", "coffee", "--methods", "raw-attention")
    assert status == 1
    assert "self-attention" in output
    assert not [*tmp_path.iterdir()]
