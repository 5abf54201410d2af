"""Files that deviate from PS3.10 in ways that other tools accept."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from pydicom import DataElement, Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

import camserve_dicom as dicom
from camserve_dicom import DicomError
from tests.dicom.samples import data_of, image, ramp

SOURCE = image(ramp(), WindowCenter=1000, WindowWidth=2000)
FILE = data_of(SOURCE)
HEADER_END = 144 + struct.unpack("<L", FILE[140:144])[0]
PREAMBLE, HEADER, BODY = FILE[:132], FILE[132:HEADER_END], FILE[HEADER_END:]


def body(*, implicit: bool, little: bool, source: Dataset = SOURCE) -> bytes:
    """Return the dataset without a header."""
    copied = Dataset()
    copied.update(source)
    if not little:
        swapped = np.frombuffer(source.PixelData, "<u2").astype(">u2").tobytes()
        copied["PixelData"] = DataElement("PixelData", "OW", swapped)
    file = DicomBytesIO()
    file.is_implicit_VR, file.is_little_endian = implicit, little
    write_dataset(file, copied)
    return file.getvalue()


def implicit_header(syntax: str, *, with_length: bool = True) -> bytes:
    """Return file meta information in implicit VR."""
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    elements = struct.pack("<HHL", 2, 0x10, len(value)) + value
    return (struct.pack("<HHLL", 2, 0, 4, len(elements)) if with_length else b"") + elements


def header(syntax: str) -> bytes:
    """Return the header with another transfer syntax."""
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    return (
        struct.pack("<HH2sHHH2sH", 2, 0, b"UL", 4, 8 + len(value), 0, b"", 0)[:8]
        + struct.pack("<LHH2sH", 8 + len(value), 2, 0x10, b"UI", len(value))
        + value
    )


def sequence_with_vr_un(order: str) -> bytes:
    """Return a private sequence with VR UN and undefined length in a dataset in big endian."""
    creator = struct.pack(">HH", 0x0009, 0x10) + b"LO" + struct.pack(">H", 4) + b"TEST"
    nested = struct.pack(f"{order}HHL", 0x0008, 0x0100, 2) + b"X1"
    item = (
        struct.pack(f"{order}HHL", 0xFFFE, 0xE000, 0xFFFFFFFF) + nested + struct.pack(f"{order}HHL", 0xFFFE, 0xE00D, 0)
    )
    end = struct.pack(f"{order}HHL", 0xFFFE, 0xE0DD, 0)
    return creator + struct.pack(">HH", 0x0009, 0x1001) + b"UN\0\0\xff\xff\xff\xff" + item + end


def big_endian_with(sequence: bytes) -> bytes:
    """Return a file in big endian with the private sequence in its place."""
    data = body(implicit=False, little=False)
    place = data.index(struct.pack(">HH", 0x0010, 0x0010))
    return PREAMBLE + header(ExplicitVRBigEndian) + data[:place] + sequence + data[place:]


FILES: dict[str, Callable[[], bytes]] = {
    "no preamble": lambda: HEADER + BODY,
    "no header": lambda: BODY,
    "no header, implicit VR": lambda: body(implicit=True, little=True),
    "no header, big endian": lambda: body(implicit=False, little=False),
    "header without transfer syntax": lambda: PREAMBLE + header("")[:12] + BODY,
    "header in implicit VR": lambda: PREAMBLE + implicit_header(ExplicitVRLittleEndian) + BODY,
    "header in implicit VR without length": lambda: (
        PREAMBLE + implicit_header(ImplicitVRLittleEndian, with_length=False) + body(implicit=True, little=True)
    ),
    "two headers": lambda: PREAMBLE + HEADER + HEADER + BODY,
    "two different headers": lambda: (
        PREAMBLE + header(ExplicitVRLittleEndian) + header(ImplicitVRLittleEndian) + body(implicit=True, little=True)
    ),
    "two preambles": lambda: PREAMBLE + HEADER + FILE,
    "two headers without preamble": lambda: HEADER + HEADER + BODY,
    "big endian": lambda: PREAMBLE + header(ExplicitVRBigEndian) + body(implicit=False, little=False),
    "big endian, declared as little": lambda: PREAMBLE + HEADER + body(implicit=False, little=False),
    "big endian with a little-endian sequence": lambda: big_endian_with(sequence_with_vr_un("<")),
    "big endian with a big-endian sequence": lambda: big_endian_with(sequence_with_vr_un(">")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_deviating_files_give_the_same_pixels(name: str) -> None:
    rendered = dicom.read(io.BytesIO(FILES[name]()))
    np.testing.assert_array_equal(rendered.pixels, dicom.read(SOURCE).pixels)
    assert rendered.source.PatientName == SOURCE.PatientName


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_truncated_deviating_files(name: str, keep: float) -> None:
    data = FILES[name]()
    with pytest.raises(DicomError) as wrong:
        dicom.read(io.BytesIO(data[: int(len(data) * keep)]))
    assert wrong.value.reason in ("TRUNCATED", "NO_PIXELS")


@pytest.mark.parametrize("data", [b"", b"\x02\x00", b"PK\x03\x04" * 100, b"\x89PNG" * 100, bytes(1000)])
def test_other_files_are_not_dicom(data: bytes) -> None:
    with pytest.raises(DicomError, match="the file is not DICOM") as wrong:
        dicom.read(io.BytesIO(data))
    assert wrong.value.reason == "NOT_DICOM"
