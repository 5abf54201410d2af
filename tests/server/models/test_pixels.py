"""Conversion of pixels to the input of a model."""

from __future__ import annotations

import io
import struct
from typing import Literal

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from camserve import images
from camserve_server.errors import InvalidArgument
from camserve_server.models.pixels import MIN_LEVELS, Preprocessing, contrast_warnings, decode
from tests.support import IMAGENET_MEAN, IMAGENET_STD


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (127 / 255,) * 3), ((0.1307,), (0.3081,))]
)
def test_each_pixel_value_is_normalised_in_float64_and_rounded_once(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, axis=2)
    x = Preprocessing((16, 16), mean, std, "bilinear")(pixels)
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
    assert preprocessing(pixels).numpy().tobytes() == expected.numpy().tobytes()


# ---- more than 8 bits ------------------------------------------------------------------------------------------------

LEVELS = np.linspace(0, 65535, 6 * 4).round().astype(np.uint16).reshape(6, 4)
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
MINISWHITE, MINISBLACK = 0, 1


def tiff(
    values: NDArray[np.generic], photometric: int, sample_format: int, bits: int = 0, order: Literal["<", ">"] = "<"
) -> bytes:
    """Return an uncompressed grey-scale TIFF file with the given tags; `bits` differs from the dtype's for 12 bits."""
    height, width = values.shape
    bits = bits or 8 * values.itemsize
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        data = b"".join(int(a << 12 | b).to_bytes(3, "big") for a, b in pairs)
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height),
            (279, len(data)), (339, sample_format)]  # fmt: skip
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    return header + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def decoded(data: bytes) -> NDArray[np.uint8]:
    image = decode(data, max_pixels=1000, field="image.encoded")
    np.testing.assert_array_equal(images.upright_rgb(PIL.Image.open(io.BytesIO(data))), image)  # the client's overlay
    return np.asarray(image)[..., 0]


def test_unsigned_16_bit_images_are_scaled() -> None:
    np.testing.assert_array_equal(decoded(tiff(LEVELS, MINISBLACK, UNSIGNED, order="<")), LEVELS >> 8)
    np.testing.assert_array_equal(decoded(tiff(LEVELS, MINISBLACK, UNSIGNED, order=">")), LEVELS >> 8)
    file = io.BytesIO()
    PIL.Image.fromarray(LEVELS).save(file, "PNG")
    np.testing.assert_array_equal(decoded(file.getvalue()), LEVELS >> 8)


def test_unsigned_12_bit_images_are_scaled() -> None:
    np.testing.assert_array_equal(decoded(tiff(LEVELS >> 4, MINISBLACK, UNSIGNED, bits=12)), LEVELS >> 8)


@pytest.mark.parametrize("values", [LEVELS, (LEVELS >> 8).astype(np.uint8)], ids=["16 bits", "8 bits"])
def test_images_whose_zero_is_white_are_inverted(values: NDArray[np.generic]) -> None:
    np.testing.assert_array_equal(decoded(tiff(values, MINISWHITE, UNSIGNED)), 255 - (LEVELS >> 8))


@pytest.mark.parametrize(
    ("dtype", "sample_format", "kind"),
    [
        (np.int8, SIGNED, "signed"),
        (np.int16, SIGNED, "signed"),
        (np.int32, SIGNED, "signed"),
        (np.uint32, UNSIGNED, "32-bit"),
        (np.float32, FLOAT, "floating-point"),
    ],
)
@pytest.mark.parametrize("photometric", [MINISWHITE, MINISBLACK])
@pytest.mark.parametrize("order", ["<", ">"])
def test_pixels_without_a_defined_range_are_refused(
    dtype: type, sample_format: int, kind: str, photometric: int, order: Literal["<", ">"]
) -> None:
    data = tiff((LEVELS >> 9).astype(dtype), photometric, sample_format, order=order)
    with pytest.raises(InvalidArgument, match=f"{kind} pixels, .*|8-bit or unsigned 16-bit") as caught:
        decoded(data)
    assert (caught.value.reason, caught.value.field) == ("UNREADABLE_IMAGE", "image.encoded")


def test_tiff_that_pillow_cannot_read_names_the_readable_types() -> None:
    with pytest.raises(InvalidArgument, match="a TIFF must contain 8-bit or unsigned 16-bit values"):
        decoded(tiff(LEVELS.astype(np.float64), MINISBLACK, FLOAT))


def test_nearly_constant_images_have_a_warning() -> None:
    rng = np.random.default_rng(0)
    noise = np.clip(rng.normal(128, 2, (64, 64, 3)).round(), 0, 255).astype(np.uint8)
    (warning,) = contrast_warnings(noise)
    assert warning.startswith("nearly constant image: 98% of its pixels are within 11 of 256 levels")
    spans = [np.linspace(20, 20 + levels - 1, 64 * 64).round().astype(np.uint8) for levels in (1, 30)]
    for span, warns in zip(spans, (True, False), strict=True):
        assert bool(contrast_warnings(span.reshape(64, 64, 1))) == warns
    one_channel = noise.copy()
    one_channel[..., 2] = rng.integers(0, 256, (64, 64))
    assert contrast_warnings(one_channel) == ()
    assert contrast_warnings(rng.integers(0, MIN_LEVELS - 1, (64, 64, 1), dtype=np.uint8))
    assert not contrast_warnings(rng.integers(0, MIN_LEVELS, (64, 64, 1), dtype=np.uint8))


def test_12_bit_values_in_16_bits_have_a_warning() -> None:
    image = decode(tiff(LEVELS >> 4, MINISBLACK, UNSIGNED), max_pixels=1000, field="image.encoded")
    assert contrast_warnings(Preprocessing((6, 4), (0.5,), (0.5,), "bilinear").resized(image))
