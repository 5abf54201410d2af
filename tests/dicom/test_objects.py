"""The DICOM objects that camserve_dicom.objects makes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import UltrasoundMultiFrameImageStorage

import camserve_dicom as dicom
from camserve.errors import InvalidArgument
from camserve.receipt import Receipt
from camserve_dicom import KINDS, maps
from camserve_dicom.derivation import Derivation
from tests.dicom.samples import (
    INSTANCE,
    SECRETS,
    SERIES,
    STUDY,
    data_of,
    errors,
    explanation,
    image,
    needs_dciodvfy,
    ramp,
    stored,
)
from tests.processes import ROOT, completed, environment

AS_IT_IS: dict[str, Any] = {"regions": "ignore", "burned_in": "ignore"}


def make_objects(
    source: Any, *, frame: int = 0, kinds: Any = KINDS, check: str | None = None, **given: Any
) -> dict[str, Dataset]:
    rendered = dicom.read(source, frame=frame, **AS_IT_IS)
    return dicom.objects(explanation(rendered.pixels, **given), rendered, kinds, check=check)


def texts(dataset: Dataset) -> str:
    return "\n".join(str(element.value) for element in dataset.iterall() if element.VR != "SQ")


# ---- conformance ----------------------------------------------------------------------------------------------------


def multi_frame() -> Dataset:
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8)
    return image(
        frames,
        SOPClassUID=UltrasoundMultiFrameImageStorage,
        Modality="US",
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
        FrameOfReferenceUID=None,
        PositionReferenceIndicator=None,
    )


SOURCES: dict[str, Callable[[], Any]] = {
    "CR, MONOCHROME1": lambda: stored("RG1_UNCR.dcm"),
    "CR, other hand": lambda: stored("RG3_UNCR.dcm"),
    "CT": lambda: stored("CT_small.dcm"),
    "mammogram": lambda: image(ramp(200, 150), Modality="MG", BodyPartExamined="BREAST", ImageLaterality="R"),
    "ultrasound": lambda: stored("US1_UNCR.dcm"),
    "ultrasound, frames": multi_frame,
    "MR, frames": lambda: stored("emri_small.dcm"),
}


@pytest.mark.slow
@needs_dciodvfy
@pytest.mark.parametrize("name", SOURCES)
def test_dciodvfy_accepts_results(name: str, tmp_path: Path) -> None:
    for kind, each in make_objects(SOURCES[name](), frame=1 if "frames" in name else 0).items():
        assert errors(each, tmp_path) == [], f"{kind} of {name}"


def test_results_are_new_series_of_the_study() -> None:
    source = image(ramp(), IssuerOfPatientID="Klinikum-Nordwest", BodyPartExamined="CHEST", LossyImageCompression="01")
    objects = make_objects(source)
    for each in objects.values():
        for name in (*SECRETS, "StudyInstanceUID", "TimezoneOffsetFromUTC", "PatientSex", "BodyPartExamined"):
            if name not in ("InstitutionName", "StationName"):  # attributes of the scanner
                assert each[name].value == source[name].value, name
        assert each.file_meta.ImplementationClassUID == dicom.IMPLEMENTATION_UID
        [equipment] = each.ContributingEquipmentSequence
        assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
        assert "sha256:" + "ab" * 32 in equipment.ContributionDescription
        receipt = Receipt.from_json(equipment.private_block(0x0099, "camserve")[0x01].value)
        assert (receipt.model, receipt.method, receipt.request_id) == ("thorax", "poly-cam", "")
        assert INSTANCE in texts(each)
        if "PixelData" in each or "FloatPixelData" in each:
            assert each.LossyImageCompression == "01"
    for name, of_source in (("SeriesInstanceUID", SERIES), ("SOPInstanceUID", INSTANCE)):
        assert len({str(each[name].value) for each in objects.values()} - {of_source}) == len(KINDS)
    assert objects["pm"].ContentQualification == "RESEARCH"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("charset", "name", "written"),
    [
        ("ISO_IR 100", "Müller^Jürgen", "ISO_IR 100"),
        ("ISO_IR 192", "山田^太郎", "ISO_IR 192"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎", "ISO_IR 192"),
        (["ISO 2022 IR 6", "ISO 2022 IR 100"], "Müller^Jürgen", "ISO_IR 192"),
        (None, "Mueller^Juergen", None),
    ],
)
def test_patient_names_in_any_character_set(charset: Any, name: str, written: Any) -> None:
    source = image(ramp(), **({"SpecificCharacterSet": charset} if charset else {}), PatientName=name)
    for kind, each in make_objects(source).items():
        reread = pydicom.dcmread(io.BytesIO(data_of(each)))
        assert str(reread.PatientName) == name, kind
        assert reread.get("SpecificCharacterSet") == written, kind


def test_label_outside_of_the_character_set_changes_it_to_utf8() -> None:
    source = image(ramp(), SpecificCharacterSet="ISO_IR 100", PatientName="Müller")
    rendered = dicom.read(source)
    answer = explanation(rendered.pixels)
    object.__setattr__(answer, "target", type(answer.target)(3, "肺炎", 0.5, 1.0))
    each = dicom.objects(answer, rendered, ["sr"], check=None)["sr"]
    assert each.SpecificCharacterSet == "ISO_IR 192"
    assert "肺炎" in texts(each)


# ---- reproducibility ------------------------------------------------------------------------------------------------


def digests() -> str:
    objects = make_objects(image(ramp(40, 50))) | {
        f"us {k}": v for k, v in make_objects(stored("US1_UNCR.dcm")).items()
    }
    return "\n".join(f"{kind} {hashlib.sha256(data_of(each)).hexdigest()}" for kind, each in objects.items())


@pytest.mark.slow
def test_other_process_makes_the_same_bytes() -> None:
    variables = environment(TZ="Asia/Tokyo", LC_ALL="tr_TR.UTF-8", PYTHONHASHSEED="7")
    code = "from tests.dicom import test_objects as t; print(t.digests())"
    other = completed([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=variables)
    assert other.stdout.strip() == digests(), other.stderr


@pytest.mark.slow
def test_uids_depend_on_the_request_but_not_on_its_id_and_cost() -> None:
    source = image(ramp())

    def uids(**given: Any) -> dict[str, str]:
        return {kind: str(each.SOPInstanceUID) for kind, each in make_objects(source, **given).items()}

    first = make_objects(source)
    again = make_objects(source, request_id="another", batch_sizes={"score": 4}, device="cuda")
    assert {k: data_of(v) for k, v in first.items()} == {k: data_of(v) for k, v in again.items()}
    original = uids()
    assert all(re.fullmatch(r"2\.25\.\d{1,39}", uid) for uid in original.values())
    for other in ({"index": 4}, {"method": "grad-cam"}, {"seed": 1}, {"model_digest": "sha256:00"}, {"budget": 9}):
        changed = uids(**other)
        assert all(changed[kind] != uid for kind, uid in original.items()), other
    windowed = dicom.read(source, window=(1000, 2000))
    assert (
        str(dicom.objects(explanation(windowed.pixels), windowed, ["sc"], check=None)["sc"].SOPInstanceUID)
        != original["sc"]
    )


# ---- the overlay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "scale"), [(500, 600, 1), (90, 128, 4), (900, 60, 1)])
def test_overlay_does_not_change_pixels_where_the_map_is_zero(height: int, width: int, scale: int) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    capture = make_objects(image(pixels), kinds=["sc"])["sc"]
    overlay = capture.pixel_array
    shown = overlay[: height * scale, : width * scale]
    rendered = dicom.read(image(pixels))
    saliency = maps.map_on_source_grid(Derivation(explanation(pixels), rendered))
    for row in range(scale):  # each pixel of an enlarged image is a block
        for column in range(scale):
            block = shown[row::scale, column::scale]
            far = saliency == 0
            far[:-3] &= saliency[3:] == 0
            far[3:] &= saliency[:-3] == 0
            far[:, :-3] &= saliency[:, 3:] == 0
            far[:, 3:] &= saliency[:, :-3] == 0
            np.testing.assert_array_equal(block[far], pixels[far])
            assert far.mean() > 0.5
    assert (shown[::scale, ::scale] != pixels).any()
    legend = overlay[height * scale :]
    assert len(legend) > 60
    assert legend.max() == 255
    assert capture.BurnedInAnnotation == "YES"
    assert [*capture.PixelSpacing] == [0.5 / scale] * 2
    [origin] = capture.SourceImageSequence
    assert (origin.ReferencedSOPInstanceUID, origin.PurposeOfReferenceCodeSequence[0].CodeValue) == (INSTANCE, "121322")
    [series] = capture.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == SERIES


@pytest.mark.parametrize(("height", "width"), [(64, 64), (900, 60), (60, 900)])
def test_legend_is_readable_and_complete(height: int, width: int) -> None:
    rendered = dicom.read(image(ramp(height, width)))
    of = explanation(rendered.pixels)
    long = dataclasses.replace(of, target=dataclasses.replace(of.target, label="Very_long_name_of_a_finding_" * 5))
    first, second = (dicom.objects(each, rendered, ["sc"], check=None)["sc"].pixel_array for each in (of, long))
    legend, margin = second[-100:], 8
    assert not legend[:, :margin].any()
    assert not legend[:, -margin:].any()
    assert len(second) > len(first)
    assert second.shape[1] > height / 2  # a screen shows the complete image


def test_results_reference_the_frame() -> None:
    objects = make_objects(multi_frame(), frame=2)
    assert objects["sc"].SourceImageSequence[0].ReferencedFrameNumber == 3
    for kind in ("sr", "esr", "pm", "seg", "gsps"):
        measurements = {e.value for e in objects[kind].iterall() if e.keyword == "ReferencedFrameNumber"}
        assert measurements == {3}, kind


# ---- the report -----------------------------------------------------------------------------------------------------


def measurements(report: Dataset) -> dict[str, tuple[float, str]]:
    found = {}

    def walk(item: Dataset) -> None:
        if item.get("ValueType") == "NUM":
            value = item.MeasuredValueSequence[0]
            found[item.ConceptNameCodeSequence[0].get("CodeValue") or item.ConceptNameCodeSequence[0].LongCodeValue] = (
                float(value.NumericValue),
                value.MeasurementUnitsCodeSequence[0].CodeValue,
            )
        for each in item.get("ContentSequence", []):
            walk(each)

    walk(report)
    return found


def test_report_has_scores_and_algorithm() -> None:
    report = make_objects(image(ramp(64, 64)), kinds=["sr"])["sr"]
    assert report.Modality == "SR"
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    found = measurements(report)
    share = found.pop("saliency-in-content")
    assert found == {
        "probability": (0.875, "1"),
        "insertion": (pytest.approx(0.7), "1"),
        "deletion": (0.25, "1"),
        "average-gain": (12.5, "%"),
    }
    assert share[0] == pytest.approx(1, abs=0.05)
    said = texts(report)
    for part in ("poly-cam", "thorax", "sha256:" + "ab" * 32, "effusion (class 3)", "RESEARCH USE ONLY"):
        assert part in said


def test_share_of_saliency_inside_the_content() -> None:
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, 32:] = 200  # the map is on the left
    rendered = dicom.read(image(pixels), window=(128, 256))
    assert rendered.content == (32, 0, 64, 64)
    report = dicom.objects(explanation(rendered.pixels), rendered, ["sr"], check=None)["sr"]
    assert measurements(report)["saliency-in-content"][0] < 0.4


def planar_groups(path: Path) -> list[highdicom.sr.PlanarROIMeasurementsAndQualitativeEvaluations]:
    """Read the measurement groups with regions by highdicom."""
    content = highdicom.sr.srread(path).content
    assert isinstance(content, highdicom.sr.MeasurementReport)
    return content.get_planar_roi_measurement_groups()


@pytest.mark.parametrize("kind", ["sr", "esr"])
def test_report_has_the_outlines_as_regions(kind: str, tmp_path: Path) -> None:
    objects = make_objects(multi_frame(), frame=1, kinds=[kind, "gsps"])
    path = tmp_path / "report.dcm"
    objects[kind].save_as(path, enforce_file_format=True)
    report = highdicom.sr.srread(path)
    assert type(report) is (highdicom.sr.ComprehensiveSR if kind == "sr" else highdicom.sr.EnhancedSR)
    groups = planar_groups(path)
    drawn = objects["gsps"].GraphicAnnotationSequence[0].GraphicObjectSequence
    regions = [group.roi for group in groups if group.roi is not None]
    assert sorted(len(region.value) for region in regions) == sorted(each.NumberOfGraphicPoints for each in drawn)
    assert [*regions[0].value.flat] in [[*each.GraphicData] for each in drawn]
    assert len({group.tracking_uid for group in groups}) == len(groups)
    assert [each.name.meaning for each in groups[0].get_measurements()][:2] == [
        "Probability of the class",
        "Insertion, area under the curve",
    ]
    references = {e.value for e in objects[kind].iterall() if e.keyword == "ReferencedSOPInstanceUID"}
    assert references == {INSTANCE}


def test_report_without_an_overlay_has_the_image_as_region(tmp_path: Path) -> None:
    report = make_objects(image(ramp(40, 60)), check="insertion>0.9")["sr"]
    report.save_as(tmp_path / "report.dcm", enforce_file_format=True)
    [group] = planar_groups(tmp_path / "report.dcm")
    assert group.roi is not None
    assert group.roi.value.tolist() == [[0, 0], [60, 0], [60, 40], [0, 40], [0, 0]]


def test_enhanced_report_of_a_withheld_overlay() -> None:
    for kinds, made in ((["esr"], {"esr"}), (["sc"], {"sr"}), (["sr", "esr", "pm", "pdf"], {"sr", "esr", "pdf"})):
        assert set(make_objects(image(ramp()), check="insertion>0.9", kinds=kinds)) == made


@pytest.mark.slow
def test_failed_check_gives_only_a_report() -> None:
    source = image(ramp())
    assert set(make_objects(source, check="insertion>deletion")) == set(KINDS)
    assert set(make_objects(source, check="insertion>=0.9", kinds=["sc"])) == {"sr"}
    report = make_objects(source, check="insertion>deletion", insertion=0.125)["sr"]
    assert "check insertion > deletion failed (0.125 and 0.25)" in texts(report)
    assert set(make_objects(source, check=None, insertion=0.125)) == set(KINDS)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ("insertion", "expected a comparison of two metrics"),
        ("insertion>iou", "needs the score 'iou'"),
        (">1", "expected a comparison"),
    ],
)
def test_invalid_check(check: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said) as wrong:
        make_objects(image(ramp()), check=check)
    assert wrong.value.field == "check"


def test_unknown_outputs() -> None:
    for wrong in (["sc", "jpeg"], "sc", []):
        with pytest.raises(InvalidArgument, match="one or several of sc, sr, esr, pm, seg, gsps, pdf"):
            make_objects(image(ramp()), kinds=wrong)


# ---- maps -----------------------------------------------------------------------------------------------------------


def test_map_and_segmentation_have_the_plane_of_the_image() -> None:
    source = image(ramp(40, 60))
    objects = make_objects(source)
    for each in (objects["pm"], objects["seg"]):
        assert each.FrameOfReferenceUID == source.FrameOfReferenceUID
        assert (each.Rows, each.Columns) == (40, 60)
        shared, own = each.SharedFunctionalGroupsSequence[0], each.PerFrameFunctionalGroupsSequence[0]
        position = own.PlanePositionSequence[0] if "PlanePositionSequence" in own else shared.PlanePositionSequence[0]
        assert [*position.ImagePositionPatient] == [*source.ImagePositionPatient]
        assert [*shared.PixelMeasuresSequence[0].PixelSpacing] == [0.5, 0.5]
        assert "SYNTHETIC" not in texts(each)
    values = objects["pm"].pixel_array
    rendered = dicom.read(source)
    expected = maps.map_on_source_grid(Derivation(explanation(rendered.pixels), rendered))
    np.testing.assert_array_equal(values, expected)
    assert values.max() == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(objects["seg"].pixel_array.astype(bool), expected >= expected.max() / 2)
    mapping = objects["pm"].SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    quantity = mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0]
    assert (quantity.CodeValue, quantity.CodingSchemeDesignator) == ("130404", "DCM")


def test_window_of_the_parametric_map() -> None:
    each = make_objects(image(ramp(40, 60)), kinds=["pm"])["pm"]
    [window] = each.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence
    assert (window.WindowCenter, window.WindowWidth, window.VOILUTFunction) == (0.5, 1, "LINEAR_EXACT")


@pytest.mark.parametrize(("method", "code"), [("grad-cam", "130403"), ("cam", "130402"), ("rise", "130404")])
def test_quantity_of_the_method(method: str, code: str) -> None:
    each = make_objects(image(ramp()), kinds=["pm"], method=method)["pm"]
    assert {e.value for e in each.iterall() if e.keyword == "CodeValue"} >= {code}


def test_synthetic_geometry_is_declared() -> None:
    for kind in ("pm", "seg"):
        each = make_objects(multi_frame(), kinds=[kind])[kind]
        assert "SYNTHETIC GEOMETRY" in each.ImageComments
        assert "SYNTHETIC GEOMETRY" in each.DerivationDescription


def test_map_is_zero_outside_of_the_crop() -> None:
    region = Dataset()
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 20, 10
    region.RegionLocationMaxX1, region.RegionLocationMaxY1, region.RegionSpatialFormat = 51, 41, 1
    rendered = dicom.read(image(ramp(64, 64), SequenceOfUltrasoundRegions=[region]), regions="crop")
    objects = dicom.objects(explanation(rendered.pixels), rendered, KINDS, check=None)
    values = objects["pm"].pixel_array
    assert values.shape == (64, 64)
    peak = np.unravel_index(values.argmax(), values.shape)
    assert (peak[0] - 10) / 32 == pytest.approx(0.6, abs=0.05)
    assert (peak[1] - 20) / 32 == pytest.approx(0.4, abs=0.05)
    values[10:42, 20:52] = 0
    assert not values.any()
    [outline] = objects["gsps"].GraphicAnnotationSequence[0].GraphicObjectSequence
    points = np.array(outline.GraphicData).reshape(-1, 2)
    assert points.min(0) == pytest.approx([20 + 32 * 0.28, 10 + 32 * 0.48], abs=2)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_outline_surrounds_the_highest_values(photometric: str) -> None:
    source = image(ramp(40, 60), PhotometricInterpretation=photometric, WindowCenter=100, WindowWidth=200)
    state = make_objects(source, kinds=["gsps"])["gsps"]
    [annotation] = state.GraphicAnnotationSequence
    assert "RESEARCH USE ONLY" in annotation.TextObjectSequence[0].UnformattedTextValue
    points = np.array(annotation.GraphicObjectSequence[0].GraphicData).reshape(-1, 2)
    np.testing.assert_array_equal(points[0], points[-1])
    assert points.mean(0) == pytest.approx([0.4 * 60, 0.6 * 40], abs=2)
    assert state.PresentationLUTShape == ("INVERSE" if photometric == "MONOCHROME1" else "IDENTITY")
    assert state.SoftcopyVOILUTSequence[0].WindowCenter == 100


def test_map_of_zeros() -> None:
    rendered = dicom.read(image(ramp()))
    answer = explanation(rendered.pixels)
    answer.saliency[:] = 0
    objects = dicom.objects(answer, rendered, KINDS, check=None)
    assert not objects["seg"].pixel_array.any()
    assert "GraphicObjectSequence" not in objects["gsps"].GraphicAnnotationSequence[0]
    assert objects["sc"].StudyInstanceUID == STUDY


def test_laterality_is_copied() -> None:
    for kind, each in make_objects(image(ramp(), BodyPartExamined="BREAST", ImageLaterality="R")).items():
        if kind in ("sc", "pm"):
            assert (each.ImageLaterality, "Laterality" in each) == ("R", False)


def test_label_changes_the_uid() -> None:
    source = image(ramp())
    rendered = dicom.read(source)
    of = explanation(rendered.pixels)
    other = dataclasses.replace(of, target=dataclasses.replace(of.target, label="pneumothorax"))
    uids = {str(dicom.objects(each, rendered, ("sr",))["sr"].SOPInstanceUID) for each in (of, other)}
    assert len(uids) == 2


def test_repr_has_no_header_values() -> None:
    rendered = dicom.read(image(ramp()))
    assert SECRETS["PatientName"] not in repr(rendered)


@pytest.mark.parametrize("spacing", [["0.5"], ["0", "0.5"]])
def test_invalid_spacing_is_ignored(spacing: Any) -> None:
    each = make_objects(image(ramp(), PixelSpacing=spacing))["sc"]
    assert "PixelSpacing" not in each


@pytest.mark.slow
def test_presentation_state_has_the_pixel_aspect_ratio() -> None:
    [area] = make_objects(image(ramp(), PixelSpacing=["0.5", "1"]))["gsps"].DisplayedAreaSelectionSequence
    assert [*area.PresentationPixelAspectRatio] == [500, 1000]
    [area] = make_objects(image(ramp()))["gsps"].DisplayedAreaSelectionSequence
    assert [*area.PresentationPixelAspectRatio] == [1, 1]


@pytest.mark.slow
def test_class_code_has_the_model_digest_as_version() -> None:
    found = [item for item in make_objects(image(ramp()))["sr"].iterall() if item.value == "class-3"]
    assert found
    versions = [
        item.value for item in make_objects(image(ramp()))["sr"].iterall() if item.keyword == "CodingSchemeVersion"
    ]
    assert "ab" * 8 in versions
