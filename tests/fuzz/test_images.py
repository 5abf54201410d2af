"""Whatever the bytes of an image: a picture, or an error of ours that names the field, in bounded time and memory."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camserve_server.errors import CamserveError
from camserve_server.models.pixels import Preprocessing, decode
from tests.fuzz.pictures import GOOD, HOSTILE

MAX_PIXELS = 1_000_000
ALLOWED_MB = 256  # beside what the process has before: the largest file, its copies, a picture of MAX_PIXELS
PREPROCESSING = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")


def outcome(data: bytes) -> str:
    """The reason of the refusal, "" for a picture. Anything else is not caught."""
    try:
        picture = decode(data, max_pixels=MAX_PIXELS, field="image.encoded")
    except CamserveError as error:
        assert error.field == "image.encoded"
        assert "MemoryError" not in error.message
        assert len(error.message) < 200
        return error.reason
    assert picture.mode == "RGB"
    assert 1 <= picture.width * picture.height <= MAX_PIXELS
    assert PREPROCESSING(picture).isfinite().all()
    return ""


@pytest.mark.parametrize("name", GOOD)
def test_a_good_picture_is_read(name: str) -> None:
    assert outcome(GOOD[name]) == ""


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A good picture with numbers overwritten, most of them in its header, pieces repeated or left out, cut off."""
    data = bytearray(draw(st.sampled_from(sorted(GOOD.values()))))
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


@settings(derandomize=True, deadline=None, max_examples=600)
@given(spoilt())
def test_a_spoilt_picture(data: bytes) -> None:
    outcome(data)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\x00", b"MM\x00*", b"II+\x00", b"GIF89a", b"BM",
                        b"RIFF\x40\x00\x00\x00WEBP", b""]), st.binary(max_size=200))  # fmt: skip
def test_any_bytes(start: bytes, rest: bytes) -> None:
    assert outcome(start + rest) != "", "two hundred random bytes are no picture"


def test_hostile_pictures_take_neither_long_nor_much_memory() -> None:
    """In a process of its own, which may not have more memory. Each took gigabytes, or minutes, if sent in full."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.test_images"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    found = dict(line.split("\t") for line in ran.stdout.splitlines())
    assert found == {name: expected for name, (_, expected) in HOSTILE.items()}


def _limited() -> None:
    """Prints what comes of each hostile picture. A second of a processor each is ten times what they take."""
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
    resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWED_MB * 10**6,) * 2)
    for name, (make, _) in HOSTILE.items():
        data, started = make(), time.process_time()
        print(name, outcome(data), sep="\t")
        assert time.process_time() - started < 2, name


if __name__ == "__main__":
    _limited()
