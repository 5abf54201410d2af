"""All forms of images: the message that the server receives, and the image that the client returns."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

import camserve
from camserve import images
from camserve.v1 import explain_pb2 as pb
from tests.client.fake_server import Servicer


def png(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def sent(servicer: Servicer, client: camserve.Client, image: images.ImageLike) -> pb.Image:
    """Explain an image and return the image message that the server received."""
    client.explain(image)
    request: pb.ExplainRequest = servicer.requests[-1]
    return request.image


def array(sent: pb.Pixels) -> np.ndarray:
    return np.frombuffer(sent.data, np.uint8).reshape(sent.height, sent.width, 3)


def test_encoded_files_are_sent_unchanged(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    data = png(pixels)
    (tmp_path / "a.png").write_bytes(data)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), data):
        assert sent(servicer, client, image).encoded == data


def test_pixels_and_pillow_images_are_sent_as_pixels(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    for image in (pixels, PIL.Image.fromarray(pixels), pixels[::-1, ::-1].copy()[::-1, ::-1]):
        np.testing.assert_array_equal(array(sent(servicer, client, image).pixels), pixels)
    grey = pixels[..., 0]
    for image in (grey, PIL.Image.fromarray(grey)):
        np.testing.assert_array_equal(array(sent(servicer, client, image).pixels), np.dstack([grey] * 3))


def test_pillow_alpha_is_dropped_and_orientation_applied(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    rgba = np.dstack([pixels, np.zeros((6, 4), np.uint8)])
    np.testing.assert_array_equal(array(sent(servicer, client, PIL.Image.fromarray(rgba)).pixels), pixels)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    turned = PIL.Image.open(io.BytesIO(png(pixels, exif=exif)))
    np.testing.assert_array_equal(array(sent(servicer, client, turned).pixels), np.rot90(pixels, -1))


@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_float32_array_is_sent_as_a_tensor(servicer: Servicer, client: camserve.Client, dtype: str) -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(dtype)
    arrived = sent(servicer, client, x.transpose(0, 2, 1)).tensor
    assert list(arrived.shape) == [3, 7, 5]
    np.testing.assert_array_equal(images.from_wire(arrived), x.transpose(0, 2, 1))
    assert list(sent(servicer, client, x[:1]).tensor.shape) == [1, 5, 7]


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((3, 4, 4)),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((2, 4, 4), np.float32),
        np.zeros((1, 3, 4, 4), np.float32),
        np.zeros(4, np.uint8),
        PIL.Image.new("F", (4, 4)),
        PIL.Image.new("I;16", (4, 4)),
    ],
    ids=lambda wrong: f"{getattr(wrong, 'dtype', wrong)!s:.20}",
)
def test_unsupported_arrays_raise_before_a_request_is_sent(
    servicer: Servicer, client: camserve.Client, wrong: Any
) -> None:
    with pytest.raises(camserve.InvalidArgument) as caught:
        client.explain(wrong)
    assert caught.value.field == "image"
    assert isinstance(caught.value, ValueError)
    assert not servicer.requests


def test_missing_file_and_unsupported_type_raise_builtin_errors(client: camserve.Client, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        client.explain(tmp_path / "none.png")
    with pytest.raises(TypeError, match=r"a builtins\.list"):
        client.explain([1, 2])  # type: ignore[arg-type]


@pytest.mark.slow
def test_too_large_image_raises_before_a_request_is_sent(
    servicer: Servicer, client: camserve.Client, tmp_path: Path
) -> None:
    large = tmp_path / "large.tif"
    with large.open("wb") as file:
        file.truncate(images.MAX_MESSAGE_BYTES + 1)
    for image in (large, np.broadcast_to(np.uint8(0), (5000, 5000, 3))):
        with pytest.raises(camserve.ResourceExhausted, match=r"MiB; expected at most 64 MiB") as caught:
            client.explain(image)
        assert (caught.value.reason, caught.value.retry_after_s) == ("TOO_LARGE", None)
    assert not servicer.requests


def test_image_above_the_default_limit_of_grpc_is_sent(servicer: Servicer, client: camserve.Client) -> None:
    assert sent(servicer, client, bytes(20 * 2**20)).ByteSize() > 20 * 2**20


def test_image_is_returned_upright_at_full_resolution(
    client: camserve.Client, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 8  # rotate by 90° counterclockwise
    path = Path(tmp_path / "turned.png")
    path.write_bytes(png(pixels, exif=exif))
    image = client.explain(path).image()
    np.testing.assert_array_equal(np.asarray(image), np.rot90(pixels))


def test_image_of_a_tensor_is_scaled(client: camserve.Client) -> None:
    x = np.linspace(-2, 3, 3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
    image = np.asarray(client.explain(x).image())
    assert image.shape == (4, 5, 3)
    assert (image.min(), image.max()) == (0, 255)
    grey = np.asarray(client.explain(x[:1]).image())
    assert grey.shape == (4, 5, 3)
    assert (grey == grey[..., :1]).all()
    for unusual in (np.full((3, 2, 2), 7, np.float32), np.full((3, 2, 2), np.nan, np.float32)):
        assert np.asarray(client.explain(unusual).image()).max() == 0


@pytest.mark.skipif(sys.byteorder == "big", reason="compares with native arrays")
def test_maps_are_writable_arrays(client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    saliency = client.explain(pixels).saliency
    assert saliency.dtype == np.float32
    saliency[0, 0] = 1


def test_size_applies_the_exif_orientation() -> None:
    wide = PIL.Image.new("RGB", (6, 4))
    for orientation, size in ((1, (6, 4)), (3, (6, 4)), (6, (4, 6)), (8, (4, 6))):
        file, exif = io.BytesIO(), PIL.Image.Exif()
        exif[0x0112] = orientation
        wide.save(file, "JPEG", exif=exif)
        message = images.to_wire(file.getvalue())
        assert images.size(message) == size == images.to_pillow(message).size
    assert images.size(images.to_wire(wide)) == (6, 4)
    assert images.size(images.to_wire(np.zeros((3, 4, 6), np.float32))) == (6, 4)
    with pytest.raises(camserve.InvalidArgument) as caught:
        images.size(images.to_wire(b"no image"))
    assert caught.value.field == "image"
