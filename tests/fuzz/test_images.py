"""Fuzz tests of image bytes: each gives an image or an error with its field, in bounded time and memory."""

from __future__ import annotations

import io
import resource
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camserve_server.errors import CamserveError
from camserve_server.models.pixels import Preprocessing, decode
from tests.fuzz.sample_images import HOSTILE, VALID
from tests.processes import ROOT, completed

MAX_PIXELS = 1_000_000
# Memory in addition to that of the process before: the largest file, its copies, and an image of MAX_PIXELS.
ALLOWED_MB = 256
PREPROCESSING = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")


def outcome(data: bytes) -> str:
    """Return the reason of the refusal, or an empty string for an image. Other exceptions are not caught."""
    try:
        image = decode(data, max_pixels=MAX_PIXELS, field="image.encoded")
    except CamserveError as error:
        assert error.field == "image.encoded"
        assert "MemoryError" not in error.message
        assert len(error.message) < 200
        return error.reason
    assert image.mode == "RGB"
    assert 1 <= image.width * image.height <= MAX_PIXELS
    assert PREPROCESSING(image).isfinite().all()
    return ""


@pytest.mark.parametrize("name", VALID)
def test_valid_image_is_decoded(name: str) -> None:
    assert outcome(VALID[name]) == ""


@st.composite
def corrupted(draw: st.DrawFn) -> bytes:
    """Change bytes of a valid image, mostly in its header: overwrite, repeat, remove and truncate them."""
    data = bytearray(draw(st.sampled_from(sorted(VALID.values()))))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(2, min(len(data), 120)) | st.integers(2, len(data)))
        match draw(st.integers(0, 3)):
            case 0:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                number = draw(st.sampled_from([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]))
                size, order = draw(st.sampled_from([2, 4])), draw(st.sampled_from(["big", "little"]))
                data[at : at + size] = (number % 256**size).to_bytes(size, order)
            case 2:
                data[at:at] = data[at : at + draw(st.integers(1, 64))] * draw(st.integers(1, 20))
            case 3:
                del data[at : at + draw(st.integers(1, 16))]
    return bytes(data[: draw(st.integers(2, len(data)))] if draw(st.booleans()) else data)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=600)
@given(corrupted())
def test_corrupted_image_is_decoded_or_refused(data: bytes) -> None:
    outcome(data)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\x00", b"MM\x00*", b"II+\x00", b"GIF89a", b"BM",
                        b"RIFF\x40\x00\x00\x00WEBP", b""]), st.binary(max_size=200))  # fmt: skip
def test_random_bytes_are_refused(start: bytes, rest: bytes) -> None:
    assert outcome(start + rest) != ""


@pytest.mark.slow
def test_hostile_images_need_little_time_and_memory() -> None:
    """A process with limited memory decodes images that would need gigabytes or minutes without the server's limits."""
    ran = completed([sys.executable, "-W", "ignore", "-m", "tests.fuzz.test_images"], cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    found = dict(line.split("\t") for line in ran.stdout.splitlines())
    assert found == {name: expected for name, (_, expected) in HOSTILE.items()}


def _limited() -> None:
    """Print the outcome of each hostile image, which must not need much more CPU time than a large valid image.

    The limit is relative, so that it does not depend on the speed of the machine.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWED_MB * 10**6,) * 2)
    limit_s = 40 * _seconds_of_a_large_image()
    for name, (make, _) in HOSTILE.items():
        data, started = make(), time.process_time()
        print(name, outcome(data), sep="\t")
        assert time.process_time() - started < limit_s, name


def _seconds_of_a_large_image() -> float:
    """Return the CPU seconds for a valid image with the largest number of pixels."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (1000, MAX_PIXELS // 1000, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(file, "PNG")
    outcome(file.getvalue())  # imports the reader
    started = time.process_time()
    assert outcome(file.getvalue()) == ""
    return time.process_time() - started


if __name__ == "__main__":
    _limited()
