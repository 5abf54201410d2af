"""Maps in other formats: the client converts them to float32 at the model's input size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import camserve
from camserve import map_format
from camserve.v1 import explain_pb2 as pb
from tests.client.fake_server import RAMP, Servicer

SIDES = st.integers(1, 60)
SIZES = st.integers(1, 300)


def by_torch(native: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    resized = F.interpolate(torch.from_numpy(native)[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    low, high = resized.min(), resized.max()
    constant = native.min() == native.max() or low == high
    scaled: NDArray[np.float32] = (torch.zeros_like(resized) if constant else (resized - low) / (high - low)).numpy()
    return scaled


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.tuples(SIDES, SIDES), st.tuples(SIZES, SIZES), st.integers(0, 2**32 - 1))
def test_restored_map_equals_that_of_torch(shape: tuple[int, int], size: tuple[int, int], seed: int) -> None:
    native = np.random.default_rng(seed).random(shape, np.float32)
    size = (max(shape[0], size[0]), max(shape[1], size[1]))
    restored = map_format.restored(native, size)
    assert restored.shape == size
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored, by_torch(native, size), rtol=0, atol=1e-6)


def test_restored_map_of_known_values() -> None:
    restored = map_format.restored(np.array([[0, 1]], np.float32), (2, 4))
    np.testing.assert_allclose(restored, [[0, 0.25, 0.75, 1]] * 2, atol=1e-7)


@pytest.mark.parametrize("value", [0, 0.3, 1])
def test_constant_map_becomes_zeros(value: float) -> None:
    assert not map_format.restored(np.full((3, 7), value, np.float32), (37, 29)).any()


@pytest.mark.parametrize(("dtype", "numpy_type"), [("float16", "<f2"), ("uint8", "u1"), ("float32", "<f4")])
def test_types_are_converted_to_float32(dtype: str, numpy_type: str) -> None:
    values = np.array([[0, 1], [128, 255]], numpy_type) / (255 if dtype == "uint8" else 256)
    data = np.array([[0, 1], [128, 255]], numpy_type) if dtype == "uint8" else values.astype(numpy_type)
    saliency = map_format.from_wire(pb.Tensor(shape=[2, 2], data=data.tobytes(), dtype=dtype), ())
    assert saliency.dtype == np.float32
    np.testing.assert_allclose(saliency, values, rtol=1e-6)
    saliency[0, 0] = 1  # The array is a copy that the caller may modify.


def test_map_at_input_size_is_not_scaled_again() -> None:
    half = np.full((2, 3), 0.5, np.float32)
    half[0, 0] = 0.25
    message = pb.Tensor(shape=half.shape, data=half.tobytes())
    assert np.array_equal(map_format.from_wire(message, [2, 3]), half)
    assert np.array_equal(map_format.from_wire(message, []), half)


def test_unknown_type_of_a_response_is_an_error() -> None:
    with pytest.raises(camserve.InternalError, match=r"type 'int4'.* install a newer version"):
        map_format.from_wire(pb.Tensor(shape=[1], data=b"a", dtype="int4"), ())


def test_format_is_sent(servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    client.explain(pixels, map_dtype="uint8", native_maps=True)
    assert servicer.requests[-1].map_format == pb.MapFormat(dtype="uint8", native=True)
    client.explain(pixels, map_dtype="float16")
    assert servicer.requests[-1].map_format == pb.MapFormat(dtype="float16")
    client.evaluate(pixels, method="grad-cam", native_maps=True)
    assert servicer.requests[-1].map_format == pb.MapFormat(native=True)
    for send in (client.explain, lambda image: client.evaluate(image, method="grad-cam")):
        send(pixels)
        assert not servicer.requests[-1].HasField("map_format")
    [*client.explain_many([pixels], map_dtype="uint8", native_maps=True)]
    assert servicer.requests[-1].map_format == pb.MapFormat(dtype="uint8", native=True)
    [*client.evaluate_many([pixels], methods="grad-cam", map_dtype="float16", native_maps=True)]
    assert servicer.requests[-1].map_format == pb.MapFormat(dtype="float16", native=True)


def test_server_that_does_not_know_formats_returns_the_default(
    client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    assert np.array_equal(client.explain(pixels, map_dtype="uint8", native_maps=True).saliency, RAMP)
