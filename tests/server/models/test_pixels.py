"""Conversion of pixels to the input of a model."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from camserve_server.models.pixels import Preprocessing
from tests.support import IMAGENET_MEAN, IMAGENET_STD


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (127 / 255,) * 3), ((0.1307,), (0.3081,))]
)
def test_each_pixel_value_is_normalised_in_float64_and_rounded_once(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, axis=2)
    x = Preprocessing((16, 16), mean, std, "bilinear").convert_pixels(pixels)
    channels = np.float32(pixels.transpose(2, 0, 1)[: len(mean)]) / 255
    column = (np.array(each)[:, None, None] for each in (mean, std))
    expected = ((channels - next(column)) / next(column)).astype(np.float32)
    assert x.numpy().tobytes() == expected.tobytes()


def test_colours_of_a_grey_scale_model_are_converted_by_their_luma() -> None:
    image = PIL.Image.new("RGB", (4, 6), (10, 200, 30))
    x = Preprocessing((6, 4), (0.0,), (1.0,), "nearest")(image)
    assert x.shape == (1, 6, 4)
    assert float(x[0, 0, 0]) == pytest.approx((0.299 * 10 + 0.587 * 200 + 0.114 * 30) / 255, abs=1 / 255)


@pytest.mark.parametrize("size", [(6, 4), (9, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_converted_like_an_image(size: tuple[int, int], channels: int) -> None:
    """Pixels of the input's size are not copied to an image; other pixels are resized."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    preprocessing = Preprocessing(size, (0.4,) * channels, (0.2,) * channels, "bicubic")
    expected = preprocessing(PIL.Image.fromarray(pixels))
    assert preprocessing.convert_pixels(pixels).numpy().tobytes() == expected.numpy().tobytes()
