"""Heat maps, overlays, saved files and the representation in notebooks."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from skimage.color import rgb2lab

import camserve
from camserve import heatmaps


def photograph(height: int, width: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_lightness_of_the_colour_scale_increases() -> None:
    lightness = rgb2lab(heatmaps.COLOURS[None])[0, :, 0]
    assert heatmaps.COLOURS.shape == (256, 3)
    assert (np.diff(lightness) > 0).all()
    assert lightness[-1] - lightness[0] > 90


def test_overlay_does_not_change_pixels_of_zero_saliency() -> None:
    image = photograph(40, 60)
    saliency = np.zeros((40, 60), np.float32)
    saliency[:, 30:] = 1
    result, original = np.asarray(heatmaps.overlay(image, saliency, 0.7)), np.asarray(image)
    np.testing.assert_array_equal(result[:, :30], original[:, :30])
    expected = 0.3 * original[:, 30:] + 0.7 * heatmaps.COLOURS[-1]
    np.testing.assert_allclose(result[:, 30:], expected, atol=1.5)


def test_alpha_blends_between_image_and_colour(ramp: NDArray[np.float32]) -> None:
    image = photograph(8, 8)
    np.testing.assert_array_equal(np.asarray(heatmaps.overlay(image, ramp, 0)), np.asarray(image))
    ones = np.ones((8, 8), np.float32)
    assert (np.asarray(heatmaps.overlay(image, ones, 1)) == heatmaps.COLOURS[-1]).all()


def test_opacity_increases_with_saliency(ramp: NDArray[np.float32]) -> None:
    result = np.asarray(heatmaps.overlay(PIL.Image.new("RGB", (8, 8)), ramp, 1)).sum(axis=2).ravel()
    assert (np.diff(result.astype(int)) >= 0).all()


def test_heatmap_covers_the_whole_image() -> None:
    corners = np.zeros((4, 4), np.float32)
    corners[0, 0] = corners[-1, -1] = 1
    hot = np.asarray(heatmaps.heatmap(corners, (300, 90)))
    assert hot.shape == (90, 300, 3)
    for corner in (hot[0, 0], hot[-1, -1]):
        np.testing.assert_array_equal(corner, heatmaps.COLOURS[255])
    for corner in (hot[0, -1], hot[-1, 0]):
        np.testing.assert_array_equal(corner, heatmaps.COLOURS[0])


def test_overlay_has_the_size_of_the_explained_image(client: camserve.Client) -> None:
    image = photograph(30, 50)
    e = client.explain(image, target=[7, 8])
    assert e.overlay().size == e.heatmap().size == e.image().size == (50, 30)
    assert [m.overlay().size for m in e.maps] == [(50, 30)] * 2
    np.testing.assert_array_equal(np.asarray(e.overlay(alpha=0)), np.asarray(image))
    with pytest.raises(ValueError, match="alpha"):
        e.overlay(alpha=1.5)


def test_save_writes_the_map_and_the_overlay(
    client: camserve.Client, tmp_path: Path, ramp: NDArray[np.float32]
) -> None:
    e = client.explain(photograph(30, 50))
    array, png = e.save(tmp_path / "new" / "folder", "dog")
    assert (array.name, png.name) == ("dog.npy", "dog.png")
    np.testing.assert_array_equal(np.load(array), ramp)
    with PIL.Image.open(png) as file:
        np.testing.assert_array_equal(np.asarray(file), np.asarray(e.overlay()))


class TagChecker(HTMLParser):
    """Parser that fails on mismatched tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "img":
            assert self.open.pop() == tag


def test_notebook_html_contains_images_and_legend(client: camserve.Client) -> None:
    html = client.explain(
        photograph(300, 900), target=[7, 8], method="<script>", model="net", metrics=["average-gain"]
    )._repr_html_()
    checked = TagChecker()
    checked.feed(html)
    assert not checked.open
    images = [PIL.Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'base64,([^"]+)', html)]
    assert [image.size for image in images] == [(300, 100)] * 6
    for text in ("cock (7)", "hen (8)", "75.0%", "net", "average-gain 0.25 %", "⚠ degenerate", "&lt;script&gt;"):
        assert text in html
    assert "<script>" not in html
    assert "http" not in html


def test_notebook_html_of_an_evaluation(client: camserve.Client, ramp: NDArray[np.float32]) -> None:
    html = client.evaluate(photograph(20, 20), saliency=ramp)._repr_html_()
    assert "given map" in html
    assert "insertion 0.25" in html
