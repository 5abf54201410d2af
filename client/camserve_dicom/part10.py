"""Parsing of DICOM files (PS3.10 7), including common deviations that other tools accept.

Accepted deviations are a missing preamble, missing file meta information, file meta information in implicit VR, several
headers in a row, and sequences in little endian inside of a big-endian file (as PS3.5 6.2.2 prescribes for VR UN).
"""

from __future__ import annotations

import io
import struct
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import pydicom
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_partial
from pydicom.filewriter import write_file_meta_info
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

__all__ = ["parse", "read_sop_class"]

_PREAMBLE = 128
_UNDEFINED = 0xFFFFFFFF
# Bytes that `read_sop_class` reads. The file meta information and the elements up to the SOP class take some hundred.
_HEAD_BYTES = 1 << 14
_SOP_CLASS = 0x00080016
# VRs whose length field has 32 bits in explicit VR.
_LONG_VRS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)


def parse(source: str | PathLike[str] | BinaryIO) -> Dataset:
    """Parse a DICOM file.

    Args:
        source: A path or a binary file.

    Returns:
        The dataset with `file_meta`.

    Raises:
        InvalidDicomError: If the file is not DICOM.
        OSError: If the file cannot be read or, without `errno`, ends too early.
        Exception: Any exception of pydicom for a corrupt file.
    """
    if isinstance(source, str | PathLike):
        with Path(source).open("rb") as file:
            data = file.read()
    else:
        data = source.read()
    return pydicom.dcmread(io.BytesIO(_normalised(data)))


def read_sop_class(path: str | PathLike[str]) -> str:
    """Read the SOP class from the first bytes of a DICOM file.

    Args:
        path: The file.

    Returns:
        The UID; empty if the file is no DICOM file or is damaged.

    Raises:
        OSError: If the file cannot be read.
    """
    with Path(path).open("rb") as file:
        data = file.read(_HEAD_BYTES)
        if DeflatedExplicitVRLittleEndian.encode() in data:  # compressed data cannot be read in part
            data += file.read()
    try:
        dataset = read_partial(io.BytesIO(_normalised(data)), stop_when=_is_after_sop_class)
        return str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    except Exception:  # a corrupt file can raise any exception in the parser
        return ""


def _is_after_sop_class(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag > _SOP_CLASS or tag.group == 0x0004  # of a DICOMDIR, whose long list precedes


def _normalised(data: bytes) -> bytes:
    """Return the file with a preamble and one header; unchanged if it has both."""
    start = _header_start(data, 0)
    if start is None:
        raise InvalidDicomError("neither a DICM prefix nor a first element of group 0002 or 0008")
    syntax, end, headers = "", start, 0
    while True:
        found, after = _read_header(data, end)
        if after == end:
            break
        syntax, end, headers = found or syntax, after, headers + 1
        end = _header_start(data, end) or end if data[end + _PREAMBLE : end + _PREAMBLE + 4] == b"DICM" else end
    body = data[end:]
    actual = _syntax_of_body(body, syntax)
    if actual == ExplicitVRBigEndian:
        body = _without_little_endian_items(body)
    is_explicit = data[start + 4 : start + 6].isalpha()
    if start and is_explicit and headers == 1 and actual == syntax and len(body) == len(data) - end:
        return data
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(actual)
    written = DicomBytesIO()
    write_file_meta_info(written, meta, enforce_standard=False)
    return b"\0" * _PREAMBLE + b"DICM" + written.getvalue() + body


def _header_start(data: bytes, position: int) -> int | None:
    """Return the position of the first element, after a preamble if there is one; None if the data are not DICOM."""
    if data[position + _PREAMBLE : position + _PREAMBLE + 4] == b"DICM":
        return position + _PREAMBLE + 4
    return position if data[position : position + 2] in (b"\2\0", b"\x08\0", b"\0\x08") and len(data) > 16 else None


def _read_header(data: bytes, position: int) -> tuple[str, int]:
    """Read file meta information in explicit or implicit VR.

    Returns:
        The transfer syntax, empty if it is missing, and the position after the header.
    """
    syntax, began = "", position
    while data[position : position + 2] == b"\2\0":
        (element,) = struct.unpack_from("<H", data, position + 2)
        if position > began and element == 0:  # the length of the next header
            break
        start, length = _value(data, position, "<")
        if length == _UNDEFINED:
            break
        if element == 0x0010:
            syntax = data[start : start + length].rstrip(b"\0 ").decode("ascii", "replace")
        position = start + length
    return syntax, position


def _value(data: bytes, position: int, order: str) -> tuple[int, int]:
    """Return the position and the length of the value of an element, whose VR may be explicit or implicit."""
    vr = data[position + 4 : position + 6]
    if not (vr.isalpha() and vr.isupper()):
        return position + 8, struct.unpack_from(f"{order}L", data, position + 4)[0]
    if vr in _LONG_VRS:
        return position + 12, struct.unpack_from(f"{order}L", data, position + 8)[0]
    return position + 8, struct.unpack_from(f"{order}H", data, position + 6)[0]


def _syntax_of_body(body: bytes, syntax: str) -> str:
    """Return the transfer syntax. If the header has none, or a byte order that the body contradicts, guess it."""
    big_endian = body[:1] == b"\0" and body[1:2] in (b"\x08", b"\x10")
    if big_endian and syntax in ("", ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        return ExplicitVRBigEndian
    if syntax:
        return syntax
    vr = body[4:6]
    return ExplicitVRLittleEndian if vr.isalpha() and vr.isupper() else ImplicitVRLittleEndian


def _without_little_endian_items(body: bytes) -> bytes:
    """Remove sequences with VR UN in little endian from a dataset in big endian; pydicom cannot parse them."""
    removed: list[tuple[int, int]] = []
    try:
        _skip_elements(body, 0, len(body), removed)
    except struct.error:  # the file is truncated, which the parser reports
        return body
    parts, position = [], 0
    for start, end in removed:
        parts.append(body[position:start])
        position = end
    return b"".join([*parts, body[position:]])


def _skip_elements(data: bytes, position: int, end: int, removed: list[tuple[int, int]]) -> int:
    """Return the position after the elements of a dataset or item in big endian, and note elements to remove."""
    while position < end:
        tag = struct.unpack_from(">HH", data, position)
        if tag == _ITEM_END:
            return position + 8
        start, length = _value(data, position, ">")
        if length != _UNDEFINED:
            position = start + length
        elif data[start : start + 4] == b"\xfe\xff\x00\xe0":
            after = _skip_items(data, start, "<", removed)
            removed.append((position, after))
            position = after
        else:
            position = _skip_items(data, start, ">", removed)
    return position


def _skip_items(data: bytes, position: int, order: str, removed: list[tuple[int, int]]) -> int:
    """Return the position after the items of a sequence of undefined length."""
    while True:
        tag = struct.unpack_from(f"{order}HH", data, position)
        length = struct.unpack_from(f"{order}L", data, position + 4)[0]
        position += 8
        if tag == _SEQUENCE_END:
            return position
        if length != _UNDEFINED:
            position += length
        elif order == ">":
            position = _skip_elements(data, position, len(data), removed)
        else:
            position = _skip_little_endian_elements(data, position)


def _skip_little_endian_elements(data: bytes, position: int) -> int:
    """Return the position after the elements of an item of undefined length."""
    while True:
        tag = struct.unpack_from("<HH", data, position)
        if tag == _ITEM_END:
            return position + 8
        start, length = _value(data, position, "<")
        position = start + length if length != _UNDEFINED else _skip_items(data, start, "<", [])
