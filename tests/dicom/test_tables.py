"""Modality and VOI LUTs in all forms, and presentation states that display the rendered pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

import camserve_dicom as dicom
from camserve_dicom import DicomError
from camserve_dicom.derivation import Derivation
from camserve_dicom.presentation_state import presentation_state
from tests.dicom.samples import errors, explanation, image, needs_dciodvfy, ramp, stored

SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]


def lut_item(
    values: Any, first: int, bits: int, *, vr: str = "OW", first_vr: str = "US", count: int | None = None
) -> Dataset:
    """Return an item of a LUT sequence. uint8 values are stored as 8-bit entries with VR OB or OW."""
    item, given = Dataset(), np.asarray(values)
    item.add_new("LUTDescriptor", first_vr, [len(given) % 65536 if count is None else count, first, bits])
    data = [*map(int, given)] if vr == "US" else given.astype("<u1" if given.dtype == np.uint8 else "<u2").tobytes()
    item.add_new("LUTData", vr, data)
    return item


def reread(dataset: Dataset, syntax: UID) -> Dataset:
    """Return the dataset as read from a file in this syntax. pydicom does not swap the bytes of OW elements."""
    implicit, little = syntax.is_implicit_VR, syntax.is_little_endian
    if not little:
        for element in [e for e in dataset.iterall() if e.VR == "OW"]:
            element.value = np.frombuffer(element.value, "<u2").astype(">u2").tobytes()
    plain = Dataset()
    plain.update(dataset)
    plain.file_meta = dataset.file_meta
    plain.file_meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    plain.save_as(file, implicit_vr=implicit, little_endian=little, enforce_file_format=True)
    return pydicom.dcmread(io.BytesIO(file.getvalue()))


VALUES = np.array([[0, 100, 255, 256, 1000, 4095], [1, 2, 3, 4, 5, 6]], np.uint16)
IDENTITY = np.arange(4096)
TABLES: dict[str, tuple[np.ndarray, dict[str, Any], Callable[[str], Dataset], np.ndarray]] = {
    "12 bits": (VALUES, {}, lambda vr: lut_item(IDENTITY, 0, 12, vr=vr), VALUES / 4095),
    "8 bits of many": (VALUES, {}, lambda vr: lut_item(IDENTITY // 16, 0, 8, vr=vr), (VALUES // 16) / 255),
    "9 bits": (VALUES, {}, lambda vr: lut_item(IDENTITY // 8, 0, 9, vr=vr), (VALUES // 8) / 511),
    "65536": (VALUES, {}, lambda vr: lut_item(np.arange(65535, -1, -1), 0, 16, vr=vr), 1 - VALUES / 65535),
    "a few": (
        VALUES,
        {},
        lambda vr: lut_item(np.arange(100), 250, 12, vr=vr),
        (VALUES.astype(int) - 250).clip(0, 99) / 4095,
    ),
    "from -1000": (
        VALUES,
        {"RescaleSlope": 1, "RescaleIntercept": -1024},
        lambda vr: lut_item(IDENTITY, 64536, 12, vr=vr),
        (VALUES.astype(int) - 24).clip(0, 4095) / 4095,
    ),
}


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.keyword)
@pytest.mark.parametrize(
    ("name", "vr"),  # an element with VR US in explicit VR holds 32767 values
    [(name, vr) for name in TABLES for vr in ("OW", "US") if (name, vr) != ("65536", "US")],
)
def test_voi_luts(name: str, vr: str, syntax: UID) -> None:
    values, attributes, make, expected = TABLES[name]
    source = reread(image(values, VOILUTSequence=[make(vr)], **attributes), syntax)
    rendered = dicom.read(source)
    np.testing.assert_array_equal(rendered.pixels, np.rint(255 * expected))
    assert "VOI LUT" in rendered.steps


@pytest.mark.parametrize("vr", ["OB", "OW"])
def test_entries_of_8_bits_in_words(vr: str) -> None:
    item = lut_item(np.arange(255, -1, -1).astype(np.uint8), 0, 8, vr=vr)
    values = np.array([[0, 1, 200], [254, 255, 300]], np.uint16)
    pixels = dicom.read(image(values, VOILUTSequence=[item])).pixels
    np.testing.assert_array_equal(pixels, 255 - values.clip(0, 255))


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("first", [-2048, -32768])
def test_modality_luts_of_signed_values(first: int, syntax: UID) -> None:
    values = np.array([[-32768, -2048, -1], [0, 2047, 32767]], np.int16)
    entries = np.arange(65536 if first == -32768 else 4096)
    item = lut_item(entries, first, 16, first_vr="SS")
    item.ModalityLUTType = "OD"
    # from 0 to 65535
    source = image(values, ModalityLUTSequence=[item], WindowCenter=32768, WindowWidth=65536)
    expected = (values.astype(int) - first).clip(0, len(entries) - 1) / 65535
    np.testing.assert_array_equal(dicom.read(reread(source, syntax)).pixels, np.rint(255 * expected))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian], ids=lambda uid: uid.keyword)
def test_voi_lut_of_a_real_image(syntax: UID) -> None:
    source = pydicom.dcmread(stored("vlut_04.dcm"))
    entries = np.asarray(source.VOILUTSequence[0].LUTData)
    count, first, bits = source.VOILUTSequence[0].LUTDescriptor
    expected = 255 * entries[(source.pixel_array.astype(int) - first).clip(0, count - 1)] / (2**bits - 1)
    if source.PhotometricInterpretation == "MONOCHROME1":
        expected = 255 - expected
    if syntax.is_implicit_VR:
        source.VOILUTSequence[0]["LUTData"] = pydicom.DataElement("LUTData", "OW", entries.astype("<u2").tobytes())
    np.testing.assert_allclose(dicom.read(reread(source, syntax)).pixels, expected, atol=0.51)


@pytest.mark.parametrize(
    "item",
    [
        lut_item(np.arange(100), 0, 12, count=4096),
        lut_item([1, 2, 3], 0, 12, vr="US", count=9),
        lut_item(IDENTITY, 0, 0),
    ],
    ids=["few words", "few numbers", "no bits"],
)
def test_invalid_lookup_table_is_a_broken_header(item: Dataset) -> None:
    with pytest.raises(DicomError) as wrong:
        dicom.read(image(ramp(), VOILUTSequence=[item]))
    assert wrong.value.reason == "BROKEN_HEADER"


# ---- presentation states --------------------------------------------------------------------------------------------


def apply_presentation_state(state: Dataset, pixels: np.ndarray) -> np.ndarray:
    """Return the grey levels, uint8, that a viewer displays for stored values (PS3.4 N.2)."""
    values = pixels.astype(float)
    if "ModalityLUTSequence" in state:
        values = apply_lut_item(state.ModalityLUTSequence[0], values)
    elif "RescaleSlope" in state:
        values = values * float(state.RescaleSlope) + float(state.RescaleIntercept)
    [voi] = state.SoftcopyVOILUTSequence
    if "VOILUTSequence" in voi:
        [item] = voi.VOILUTSequence
        shown = apply_lut_item(item, values) / (2 ** item.LUTDescriptor[2] - 1)
    else:
        c, w, function = float(voi.WindowCenter), float(voi.WindowWidth), voi.VOILUTFunction
        if function == "SIGMOID":
            shown = 1 / (1 + np.exp(-4 * (values - c) / w))
        elif function == "LINEAR_EXACT":
            shown = (values - c) / w + 0.5
        else:
            low, high = c - 0.5 - (w - 1) / 2, c - 0.5 + (w - 1) / 2
            shown = np.where(values <= low, 0, np.where(values > high, 1, (values - low) / max(high - low, 1e-9)))
    if state.PresentationLUTShape == "INVERSE":
        shown = 1 - shown
    levels: np.ndarray = np.rint(255 * shown.clip(0, 1))
    return levels


def apply_lut_item(item: Dataset, values: np.ndarray) -> np.ndarray:
    """Return the entries of a lookup table for values (PS3.3 C.11.2.1.1)."""
    entries = np.frombuffer(item.LUTData, "<u2" if item.LUTDescriptor[2] == 16 else "<u1")
    assert len(entries) == (item.LUTDescriptor[0] % 65536 or 65536)
    indices = (np.rint(values).astype(int) - item.LUTDescriptor[1]).clip(0, len(entries) - 1)
    mapped: np.ndarray = entries[indices].astype(float)
    return mapped


MODALITY = lut_item(65535 - 16 * IDENTITY, 0, 16)
RENDERINGS: dict[str, dict[str, Any]] = {
    "VOI LUT": {"VOILUTSequence": [lut_item(IDENTITY, 0, 12)]},
    "VOI LUT of US": {"VOILUTSequence": [lut_item(IDENTITY, 0, 12, vr="US")]},
    "VOI LUT and windows": {
        "VOILUTSequence": [lut_item(IDENTITY, 0, 12)],
        "WindowCenter": [1, 2],
        "WindowWidth": [3, 4],
    },
    "VOI LUT from -1000": {
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "VOILUTSequence": [lut_item(IDENTITY, -1000, 12, first_vr="SS")],
    },
    "VOI LUT of 65536": {"VOILUTSequence": [lut_item(np.arange(65536), 0, 16)]},
    "VOI LUT of bytes": {"VOILUTSequence": [lut_item(np.arange(256).astype(np.uint8), 0, 8)]},
    "no slope": {"RescaleSlope": "", "RescaleIntercept": 5},
    "slope alone": {"RescaleSlope": 2},
    "slope 0": {"RescaleSlope": 0, "RescaleIntercept": 0},
    "modality LUT": {"ModalityLUTSequence": [MODALITY]},
    "modality LUT of bytes": {"ModalityLUTSequence": [lut_item(np.arange(255, -1, -1).astype(np.uint8), 0, 8)]},
    "width 0": {"WindowCenter": 5, "WindowWidth": 0},
    "two centres, one width": {"WindowCenter": [500, 6], "WindowWidth": 900},
    "two windows, one explanation": {
        "WindowCenter": [5, 6],
        "WindowWidth": [3, 4],
        "WindowCenterWidthExplanation": "A",
    },
    "an unknown function": {"WindowCenter": 500, "WindowWidth": 900, "VOILUTFunction": "LOG"},
    "sigmoid": {"WindowCenter": 500, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
    "exact": {"WindowCenter": 500, "WindowWidth": 900, "VOILUTFunction": "LINEAR_EXACT"},
    "inverse": {"WindowCenter": 500, "WindowWidth": 900, "PhotometricInterpretation": "MONOCHROME1"},
    "nothing": {},
    "rescaled": {"RescaleSlope": 2, "RescaleIntercept": -7},
}


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, (3000, 4000)])
@pytest.mark.parametrize("name", RENDERINGS)
def test_presentation_state_displays_the_rendered_pixels(name: str, window: Any) -> None:
    pixels = ramp(20, 30)
    rendered = dicom.read(image(pixels, **RENDERINGS[name]), window=window)
    # A window outside of the values gives a constant image, of which `objects` makes a report only.
    state = presentation_state(Derivation(explanation(rendered.pixels), rendered))
    np.testing.assert_allclose(apply_presentation_state(state, pixels), rendered.pixels, atol=1)


@pytest.mark.slow
@needs_dciodvfy
@pytest.mark.parametrize("name", RENDERINGS)
def test_dciodvfy_accepts_presentation_states(name: str, tmp_path: Path) -> None:
    rendered = dicom.read(image(ramp(20, 30), **RENDERINGS[name]))
    state = dicom.objects(explanation(rendered.pixels), rendered, ["gsps"], check=None)["gsps"]
    assert errors(state, tmp_path) == []


@pytest.mark.parametrize("name", ["vlut_04.dcm", "mlut_18.dcm", "CT_small.dcm", "RG1_UNCR.dcm"])
def test_presentation_state_of_a_real_image(name: str) -> None:
    rendered = dicom.read(stored(name))
    state = dicom.objects(explanation(rendered.pixels), rendered, ["gsps"], check=None)["gsps"]
    np.testing.assert_allclose(
        apply_presentation_state(state, pydicom.dcmread(stored(name)).pixel_array), rendered.pixels, atol=1
    )
