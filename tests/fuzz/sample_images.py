"""Images for fuzz tests: one of each format, and hostile ones that are constructed by hand."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).convert(mode).save(file, kind, **options)
    return file.getvalue()


def _deep() -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS[..., 0].astype(np.uint16) << 8).save(file, "PNG")
    return file.getvalue()


def _exif(orientation: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description"
    return exif.tobytes()


FRAMES = [PIL.Image.fromarray(PIXELS[::-1]), PIL.Image.fromarray(PIXELS // 2)]

VALID: dict[str, bytes] = {
    "jpeg": encoded("JPEG", exif=_exif(6), comment=b"a comment"),
    "jpeg-progressive": encoded("JPEG", progressive=True),
    "jpeg-cmyk": encoded("JPEG", "CMYK"),
    "png": encoded("PNG", exif=_exif(3)),
    "png-palette": encoded("PNG", "P", transparency=bytes(range(256))),
    "png-16-bit": _deep(),
    "gif": encoded("GIF", "P", save_all=True, append_images=FRAMES, comment=b"a comment"),
    "webp": encoded("WEBP", exif=_exif(8)),
    "webp-lossless": encoded("WEBP", "RGBA", lossless=True),
    "webp-animated": encoded("WEBP", save_all=True, append_images=FRAMES),
    "tiff": encoded("TIFF"),
    "tiff-deflate": encoded("TIFF", compression="tiff_adobe_deflate"),
    "tiff-jpeg": encoded("TIFF", compression="jpeg"),
    "tiff-fax": encoded("TIFF", "1", compression="group4"),
    "bmp": encoded("BMP"),
}


# ---- hostile ---------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, extra: bytes = b"", rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), extra, _chunk(b"IDAT", zlib.compress(rows, 9)), _chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _jpeg(extra: bytes) -> bytes:
    return VALID["jpeg"][:2] + extra + VALID["jpeg"][2:]


def _jpeg_of_scans(count: int) -> bytes:
    data = VALID["jpeg-progressive"]
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def _gif(extra: bytes, width: int = 8, height: int = 8) -> bytes:
    size = struct.pack("<HH", width, height)
    start = b"GIF89a" + size + b"\x80\x00\x00" + b"\x00\x00\x00\xff\xff\xff"
    return start + extra + b",\x00\x00\x00\x00" + size + b"\x00\x02\x02D\x01\x00;"


def _tiff(tags: list[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\x00" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def _tiff_of_strips(count: int) -> bytes:
    at = 8 + 2 + 12 * 9 + 4
    lists = [(273, 4, count, at), (278, 4, 1, 1), (279, 4, count, at)]
    return _tiff([*GREY_8X8, *lists], struct.pack("<I", 1) * count)


def _tiff_of_overlapping_tags(count: int, size: int) -> bytes:
    return _tiff([*GREY_8X8, *((1000 + i, 7, size, 8) for i in range(count))], bytes(size))


def _mpf(count: int) -> bytes:
    """Return the index of a multi-picture JPEG whose entries all point at the same bytes."""
    index = b"MPF\x00" + _tiff([(1000 + i, 3, 20_000, 8) for i in range(count)])
    index = index.ljust(65_000, b"\x00")
    return b"\xff\xe2" + struct.pack(">H", len(index) + 2) + index


def _webp(side: int) -> bytes:
    """Return a lossless WebP file that consists only of a header."""
    data = b"\x2f" + struct.pack("<I", (side - 1) | (side - 1) << 14) + bytes(5)
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBPVP8L" + struct.pack("<I", len(data)) + data


GREY_8X8 = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
MIB = 1 << 20
LONG = bytes(2 * MIB)

# The name, the file, and the reason of the refusal. It is empty if the file is decoded without its excessive parts.
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "jpeg of empty segments": (lambda: _jpeg(b"\xff\xe5\x00\x02" * MIB), "TOO_LARGE"),
    "jpeg of fill bytes": (lambda: _jpeg(b"\xff" * (4 * MIB)), "TOO_LARGE"),
    "jpeg of a thousand scans": (lambda: _jpeg_of_scans(1000), "TOO_LARGE"),
    "jpeg with EXIF in pieces": (lambda: _jpeg((b"\xff\xe1\xff\xffExif\x00\x00" + bytes(65_527)) * 60), ""),
    "jpeg with an overlapping index": (lambda: _jpeg(_mpf(5000)), ""),
    "png of empty chunks": (lambda: _png(8, 8, _chunk(b"abCd") * 300_000), "TOO_LARGE"),
    "png of texts": (lambda: _png(8, 8, _chunk(b"tEXt", b"a\x00") * 300_000), "TOO_LARGE"),
    "png with texts that inflate": (
        lambda: _png(8, 8, _chunk(b"zTXt", b"a\x00\x00" + zlib.compress(LONG)) * 100),
        "UNREADABLE_IMAGE",
    ),
    "png with a huge declared size": (lambda: _png(2**31 - 1, 2**31 - 1), "TOO_LARGE"),
    "png with pixels that inflate": (lambda: _png(20_000, 20_000, rows=LONG), "TOO_LARGE"),
    "png of one row": (lambda: _png(3_000_000, 1, rows=bytes(9_000_001)), "TOO_LARGE"),
    "png of one column": (lambda: _png(1, 3_000_000, rows=bytes(12_000_000)), "TOO_LARGE"),
    "png with overlapping EXIF": (
        lambda: _png(8, 8, _chunk(b"eXIf", _tiff_of_overlapping_tags(5000, 2 * MIB))),
        "UNREADABLE_IMAGE",
    ),
    "gif of comments": (lambda: _gif(b"\x21\xfe\x01a\x00" * 800_000), "TOO_LARGE"),
    "gif of junk": (lambda: _gif(bytes(4 * MIB)), "TOO_LARGE"),
    "gif with a huge declared size": (lambda: _gif(b"", 65_535, 65_535), "TOO_LARGE"),
    "tiff of strips": (lambda: _tiff_of_strips(500_000), "TOO_LARGE"),
    "tiff with strip offsets of one byte": (lambda: _tiff([*GREY_8X8, (273, 1, 2 * MIB, 8)], LONG), "TOO_LARGE"),
    "tiff with overlapping tags": (lambda: _tiff_of_overlapping_tags(60_000, 2 * MIB), "TOO_LARGE"),
    "webp with a huge declared size": (lambda: _webp(16_383), "TOO_LARGE"),
}
