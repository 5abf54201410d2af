"""Attributes of results that are copied from the source, and those that are set without one."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.datadict import dictionary_VR

import camserve_dicom as dicom
from camserve_dicom import KINDS, DicomError, copied_attributes, secondary_capture
from tests.dicom.samples import data_of, errors, explanation, image, needs_dciodvfy, ramp, stored

pytestmark = pytest.mark.slow

AS_IT_IS: dict[str, Any] = {"regions": "ignore", "burned_in": "ignore"}
NO_PLANE = dict.fromkeys(
    ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "PositionReferenceIndicator")
)


def make_objects(source: Any, *, label: str = "effusion", frame: int = 0, kinds: Any = KINDS) -> dict[str, Dataset]:
    rendered = dicom.read(source, frame=frame, **AS_IT_IS)
    answer = explanation(rendered.pixels)
    answer = dataclasses.replace(answer, target=dataclasses.replace(answer.target, label=label))
    return dicom.objects(answer, rendered, kinds, check=None)


def values_of(result: Dataset, keyword: str) -> list[Any]:
    return [element.value for element in result.iterall() if element.keyword == keyword]


# ---- labels ---------------------------------------------------------------------------------------------------------


@needs_dciodvfy
@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("left\\right", "left right"),
        ("a\nb\tc\r\n ", "a b c"),
        ("long name " * 300, "long name " * 19 + "long na..."),
        ("\\\n", "class 3"),
    ],
)
def test_labels_are_cleaned_and_shortened(label: str, said: str, tmp_path: Path) -> None:
    objects = make_objects(image(ramp(40, 60)), label=label)
    for kind, each in objects.items():
        assert errors(each, tmp_path) == [], kind
    assert values_of(objects["seg"], "SegmentLabel") == [said[:64]]
    assert said in objects["gsps"].GraphicAnnotationSequence[0].TextObjectSequence[0].UnformattedTextValue
    assert objects["sc"].DerivationDescription.endswith("percentile")


# ---- the study ------------------------------------------------------------------------------------------------------


@functools.cache
def copied_modules() -> dict[str, list[str]]:
    """Return the attributes of each copied module, from highdicom's list of the standard."""
    listed = importlib.resources.files("highdicom").joinpath("_standard/module_attribute_map.json")
    names = ("patient", "clinical-trial-subject", "clinical-trial-study", "general-study", "patient-study")
    found = json.loads(listed.read_text())
    return {module: [each["keyword"] for each in found[module] if not each["path"]] for module in names}


def complete_item(keyword: str) -> Dataset:
    """Return an item with all attributes that are required in it."""
    item = Dataset()
    if keyword.endswith("CodeSequence"):
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "1", "99TEST", "a meaning"
        return item
    for alternatives in copied_attributes._REQUIRED_IN_ITEMS.get(keyword, ["PatientID"]):
        name = alternatives.partition("|")[0]
        vr = dictionary_VR(name)
        setattr(item, name, [complete_item(name)] if vr == "SQ" else {"CS": "YES", "UI": "1.2.3", "US": 4}.get(vr, "1"))
    if "UniversalEntityID" in item:
        item.UniversalEntityIDType = "ISO"
    return item


@pytest.mark.parametrize("module", copied_modules())
def test_patient_trial_and_study_modules_are_copied(module: str) -> None:
    source = image(ramp(), PatientSpeciesDescription="Canis")
    for keyword in copied_modules()[module]:
        vr = dictionary_VR(keyword)
        if vr == "SQ":
            setattr(source, keyword, [complete_item(keyword)])
        elif keyword not in source:
            value = {"DA": "20240102", "TM": "1112", "AS": "050Y", "US": 4, "FD": 1.5, "UI": "1.2.3", "DT": "2024"}
            setattr(source, keyword, value.get(vr, "1"))
    for kind, each in make_objects(source).items():
        different = [name for name in copied_modules()[module] if each.get(name) != source.get(name)]
        assert different == [], kind


@pytest.mark.parametrize(
    ("charset", "name", "label", "written"),
    [
        ("ISO_IR 13", "ﾔﾏﾀﾞ^ﾀﾛｳ", "肺炎", "ISO_IR 192"),
        ("ISO_IR 6", "Mueller", "Müll", "ISO_IR 192"),
        ("ISO 2022 IR 6", "Mueller", "Müll", "ISO_IR 192"),
        ("ISO_IR 6", "Mueller", "effusion", "ISO_IR 6"),
        ("ISO_IR 100", "Müller", "Müll", "ISO_IR 100"),
    ],
)
def test_labels_in_any_character_set(charset: Any, name: str, label: str, written: Any) -> None:
    for kind, each in make_objects(image(ramp(), SpecificCharacterSet=charset, PatientName=name), label=label).items():
        reread = pydicom.dcmread(io.BytesIO(data_of(each)))
        assert str(reread.PatientName) == name, kind
        if kind != "pdf":  # only its pages have the label
            assert reread.SpecificCharacterSet == written, kind
        if kind == "sc":
            assert label in reread.DerivationDescription


# ---- laterality, geometry and dates ---------------------------------------------------------------------------------


@needs_dciodvfy
@pytest.mark.parametrize(("side", "part"), [("R", "HAND"), ("L", "BREAST"), ("B", "BREAST"), ("U", "HEAD")])
def test_laterality_of_series_and_images(side: str, part: str, tmp_path: Path) -> None:
    objects = make_objects(image(ramp(40, 60), ImageLaterality=side, BodyPartExamined=part))
    for kind, each in objects.items():
        assert errors(each, tmp_path) == [], kind
    assert objects["gsps"].get("Laterality", "absent") == {"B": "", "U": "absent"}.get(side, side)
    assert objects["sc"].ImageLaterality == side


def enhanced_image() -> Dataset:
    anatomy, measures, shared = Dataset(), Dataset(), Dataset()
    anatomy.FrameLaterality = "R"
    measures.PixelSpacing = [0.25, 0.25]
    shared.FrameAnatomySequence, shared.PixelMeasuresSequence = [anatomy], [measures]
    return image(
        np.stack([ramp(40, 60)] * 2),
        PixelSpacing=None,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[Dataset(), Dataset()],
    )


def test_laterality_and_spacing_of_a_frame() -> None:
    objects = make_objects(enhanced_image(), frame=1)
    assert objects["sc"].ImageLaterality == objects["pm"].ImageLaterality == "R"
    assert objects["gsps"].Laterality == "R"
    assert [*objects["sc"].PixelSpacing] == [pytest.approx(0.25 / 7)] * 2


@needs_dciodvfy
@pytest.mark.parametrize(
    ("attributes", "spacing"),
    [
        ({"PixelSpacing": [0.143, 0.143]}, [0.143, 0.143]),
        ({"PixelSpacing": None, "ImagerPixelSpacing": [0.2, 0.1]}, [0.2, 0.1]),
        ({"PixelSpacing": None, "PixelAspectRatio": [2, 1]}, [2, 1]),
        ({"PixelSpacing": None}, [1, 1]),
    ],
)
def test_synthetic_geometry_has_the_spacing_of_the_header(attributes: Any, spacing: Any, tmp_path: Path) -> None:
    for kind, each in make_objects(image(ramp(40, 60), **NO_PLANE, **attributes), kinds=["pm", "seg"]).items():
        [measures] = each.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
        assert [*measures.PixelSpacing] == spacing
        assert "SYNTHETIC GEOMETRY" in each.ImageComments
        assert errors(each, tmp_path) == [], kind


@needs_dciodvfy
@pytest.mark.parametrize("thickness", [None, 0, 2])
def test_unknown_slice_thickness_is_only_set_in_segmentations(thickness: Any, tmp_path: Path) -> None:
    objects = make_objects(image(ramp(40, 60), SliceThickness=thickness), kinds=["pm", "seg"])
    for kind, each in objects.items():
        [measures] = each.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
        assert "SpacingBetweenSlices" not in measures
        assert measures.get("SliceThickness") == (thickness or (1 if kind == "seg" else None))
        assert errors(each, tmp_path) == [], kind


@needs_dciodvfy
@pytest.mark.parametrize(
    ("directions", "written"),
    [
        (["0.70711", "0.70711", "0", "-0.70711", "0.70711", "0.001"], True),
        (["1", "0", "0", "0", "0.999", "0"], True),
        (["1", "0", "0", "0", "0.9", "0.1"], False),
        (["1", "0", "0", "1", "0", "0"], False),
        (["0"] * 6, False),
    ],
)
def test_directions_are_normalised_or_replaced(directions: list[str], written: Any, tmp_path: Path) -> None:
    for kind, each in make_objects(
        image(ramp(40, 60), ImageOrientationPatient=directions), kinds=["pm", "seg"]
    ).items():
        [orientation] = each.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
        found = np.reshape(np.array(orientation.ImageOrientationPatient, float), (2, 3))
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        assert ("ImageComments" in each) == (not written)
        assert errors(each, tmp_path) == [], kind


def test_position_reference_and_spacing_calibration_are_copied() -> None:
    calibrated = {"PixelSpacingCalibrationType": "FIDUCIAL", "PixelSpacingCalibrationDescription": "a coin"}
    capture = make_objects(image(ramp(), PositionReferenceIndicator="XIPHOID", **calibrated), kinds=["sc"])["sc"]
    assert capture.PositionReferenceIndicator == "XIPHOID"
    assert {name: capture[name].value for name in calibrated} == calibrated


@needs_dciodvfy
def test_image_without_a_date_gives_only_required_dates(tmp_path: Path) -> None:
    for kind, each in make_objects(image(ramp(40, 60), StudyDate=None, StudyTime=None)).items():
        dated = {element.keyword for element in each.iterall() if element.value == "19000101"}
        needed = {"sc": set(), "gsps": {"PresentationCreationDate"}}
        assert dated == needed.get(kind, {"ContentDate"}), kind
        assert errors(each, tmp_path) == [], kind


@needs_dciodvfy
@pytest.mark.parametrize("date", ["00010101", "09991231"])
def test_years_below_1000_are_not_written(date: str, tmp_path: Path) -> None:
    """Results copy Study Date, and have no other date of such a year."""
    plain, dated = (
        make_objects(image(ramp(40, 60), StudyTime=None, **attributes))
        for attributes in ({"StudyDate": None}, {"StudyDate": date})
    )
    for kind in KINDS:
        dated[kind].StudyDate = None
        assert errors(dated[kind], tmp_path) == [], kind
        for name in ("SeriesDate", "ContentDate", "InstanceCreationDate", "PresentationCreationDate"):
            assert dated[kind].get(name) == plain[kind].get(name), name


def test_a_later_date_replaces_a_year_below_1000() -> None:
    objects = make_objects(image(ramp(40, 60), AcquisitionDate="00010101", SeriesDate="20200304", SeriesTime="0102"))
    assert {each.ContentDate for kind, each in objects.items() if kind not in ("gsps",)} == {"20200304"}


def test_lossy_compression_is_declared() -> None:
    source = pydicom.dcmread(stored("SC_rgb_jpeg_dcmtk.dcm"))
    for name in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        source.pop(name, None)
    objects = make_objects(source, kinds=["sc", "pm", "seg"])
    assert {each.LossyImageCompression for each in objects.values()} == {"01"}
    assert "LossyImageCompression" not in source
    assert make_objects(image(ramp()), kinds=["pm"])["pm"].LossyImageCompression == "00"


# ---- references -----------------------------------------------------------------------------------------------------


def test_references_to_the_source() -> None:
    objects = make_objects(enhanced_image(), frame=1)
    for kind in ("sc", "pm", "seg"):
        [source] = objects[kind].SourceImageSequence
        assert source.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        assert source.ReferencedFrameNumber == 2
        [instance] = objects[kind].ReferencedSeriesSequence[0].ReferencedInstanceSequence
        assert "ReferencedFrameNumber" not in instance
    assert objects["gsps"].ReferencedSeriesSequence[0].ReferencedImageSequence[0].ReferencedFrameNumber == 2


def test_tracking_and_dimension_uids() -> None:
    objects = make_objects(image(ramp()))
    [segment] = objects["seg"].SegmentSequence
    assert segment.TrackingUID in values_of(objects["sr"], "UID")
    assert segment.TrackingID in values_of(objects["sr"], "TextValue")
    first, second = ({*values_of(objects[kind], "DimensionOrganizationUID")} for kind in ("pm", "seg"))
    assert len(first) == len(second) == len(first ^ second) / 2 == 1


def test_segment_has_a_display_colour() -> None:
    [segment] = make_objects(image(ramp()), kinds=["seg"])["seg"].SegmentSequence
    lightness, a, b = segment.RecommendedDisplayCIELabValue
    assert lightness / 65535 * 100 == pytest.approx(87, abs=1)
    assert [round(each / 65535 * 255 - 128) for each in (a, b)] == [3, 86]


def test_coding_scheme_is_identified() -> None:
    [scheme] = make_objects(image(ramp()), kinds=["sr"])["sr"].CodingSchemeIdentificationSequence
    assert scheme.CodingSchemeDesignator == "99CAMSERVE"


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sc", "pm", "seg"])
def test_results_are_not_sources(kind: str) -> None:
    result = make_objects(image(ramp(40, 60)), kinds=[kind])[kind]
    with pytest.raises(DicomError, match="camserve has made") as wrong:
        dicom.read(result, **AS_IT_IS)
    assert wrong.value.reason == "OWN_RESULT"


def test_values_that_do_not_fit_into_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = dicom.read(image(ramp()))
    answer = explanation(rendered.pixels, method="a\\b")
    with pytest.raises(DicomError, match="the object of kind pm cannot be made") as wrong:
        dicom.objects(answer, rendered, ["pm"], check=None)
    assert wrong.value.reason == "UNWRITABLE_RESULT"
    assert np.iinfo(np.uint16).max == secondary_capture.MAX_ROWS
    monkeypatch.setattr(secondary_capture, "MAX_ROWS", 700)
    tall = dicom.read(image(np.tile(np.arange(690, dtype=np.uint16)[:, None], (1, 2))))
    with pytest.raises(DicomError, match="expected at most 700") as wrong:
        dicom.objects(explanation(tall.pixels), tall, ["sc"], check=None)
    assert wrong.value.reason == "UNSUPPORTED_PIXELS"
