"""The objects of a study and the codes of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import highdicom
import pydicom
import pytest
from pydicom import Dataset

import camserve_dicom as dicom
from camserve.errors import InvalidArgument
from camserve_dicom import KINDS
from camserve_dicom.derivation import Derivation
from camserve_dicom.results import derived_objects
from camserve_dicom.study_report import ExplainedImage, Flag, Reference, patient_and_study, study_objects
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
)
from tests.dicom.test_objects import measurements, multi_frame, texts
from tests.dicom.test_viewers import LABELS, loaded, needs_ohif, read_by_ohif

EFFUSION = dicom.ClassCode("effusion", "60046008", "SCT", "Pleural effusion")


def explained(number: int = 0, source: Dataset | None = None, frame: int = 0, **given: Any) -> ExplainedImage:
    """Return the record of an image, after a conversion to JSON and back."""
    codes, kinds = given.pop("codes", ()), given.pop("kinds", ["sc", "sr"])
    source = image(ramp(40, 60), SOPInstanceUID=f"{INSTANCE}.{number}") if source is None else source
    rendered = dicom.read(source, frame=frame)
    derivation = Derivation(explanation(rendered.pixels, **given), rendered, "insertion>deletion", None, (), codes)
    record = ExplainedImage.of(derivation, derived_objects(derivation, kinds))
    return ExplainedImage.from_json(json.loads(json.dumps(record.to_json())))


def header() -> Dataset:
    return patient_and_study(dicom.read(image(ramp(40, 60))).source)


def saved(made: Dataset, folder: Path) -> Path:
    path = folder / "saved.dcm"
    made.save_as(path, enforce_file_format=True)
    return path


def references(made: Dataset) -> set[str]:
    """Return the SOP Instance UIDs that the content tree references."""

    def walk(item: Dataset) -> set[str]:
        own = {str(each.ReferencedSOPInstanceUID) for each in item.get("ReferencedSOPSequence", [])}
        return own.union(*map(walk, item.get("ContentSequence", [])))

    return walk(made)


# ---- the report of the study ----------------------------------------------------------------------------------------


def test_report_has_each_finding_and_all_results(tmp_path: Path) -> None:
    images = [explained(0, kinds=KINDS), explained(1, index=4)]
    [made] = study_objects(header(), images, texts=["Left out: 2."]).values()
    report = highdicom.sr.srread(saved(made, tmp_path))
    assert type(report) is highdicom.sr.ComprehensiveSR
    assert isinstance(report.content, highdicom.sr.MeasurementReport)
    groups = report.content.get_planar_roi_measurement_groups()
    assert [str(group.finding_type.value) for group in groups if group.finding_type] == ["class-3", "class-4"]
    assert measurements(made)["probability"] == (0.875, "1")
    results = {result.sop_instance for each in images for result in each.results}
    assert len(results) == len(KINDS) + 2
    assert references(made) == results | {f"{INSTANCE}.0", f"{INSTANCE}.1"}
    [evidence] = made.CurrentRequestedProcedureEvidenceSequence
    listed = {
        str(each.ReferencedSOPInstanceUID): str(series.SeriesInstanceUID)
        for series in evidence.ReferencedSeriesSequence
        for each in series.ReferencedSOPSequence
    }
    assert listed.keys() == references(made)
    assert listed[f"{INSTANCE}.0"] == SERIES
    said = texts(made)
    for part in ("RESEARCH USE ONLY", "Left out: 2.", "A map shows what influenced the model, not where disease is."):
        assert part in said
    for name in SECRETS:
        if name not in ("InstitutionName", "StationName"):
            assert str(made[name].value) == SECRETS[name], name
    assert made.StudyInstanceUID == STUDY
    assert made.Manufacturer == "camserve"


def test_ohif_rules_hold_for_the_report() -> None:
    made = study_objects(header(), [explained(0), explained(1)])["study"]
    found = loaded(made)
    assert found["images"] == [f"{INSTANCE}.0", f"{INSTANCE}.1"]
    assert [each["instance"] for each in found["measurements"]] == found["images"]
    assert len({each["uid"] for each in found["measurements"]}) == 2


@pytest.mark.slow
@needs_ohif
def test_ohif_loads_the_report(tmp_path: Path) -> None:
    made = study_objects(header(), [explained(0), explained(1, codes=(EFFUSION,))])["study"]
    [line] = read_by_ohif(tmp_path, made)
    instances = [f"{INSTANCE}.0", f"{INSTANCE}.1"]
    assert line["messages"] == []
    assert [each["ReferencedSOPInstanceUID"] for each in line["referencedImages"]] == instances
    for measurement, instance in zip(line["measurements"], instances, strict=True):
        assert measurement["coords"][0]["GraphicType"] == "POLYLINE"
        assert measurement["coords"][0]["ReferencedSOPSequence"][0]["ReferencedSOPInstanceUID"] == instance
        assert measurement["labels"][0]["label"] == LABELS[0]


def test_withheld_overlay_is_reported() -> None:
    made = study_objects(header(), [explained(0), explained(1, insertion=0.1)])["study"]
    assert "Image 2: the overlay is withheld. The faithfulness check insertion > deletion failed" in texts(made)


def test_predecessor() -> None:
    first = study_objects(header(), [explained(0)])["study"]
    second = study_objects(header(), [explained(0), explained(1)], predecessor=Reference.to(first))["study"]
    assert "PredecessorDocumentsSequence" not in first
    [study] = second.PredecessorDocumentsSequence
    [series] = study.ReferencedSeriesSequence
    [document] = series.ReferencedSOPSequence
    assert (study.StudyInstanceUID, series.SeriesInstanceUID) == (STUDY, first.SeriesInstanceUID)
    assert document.ReferencedSOPInstanceUID == first.SOPInstanceUID != second.SOPInstanceUID


def test_same_bytes_in_any_order() -> None:
    images = [explained(0), explained(1)]
    first, second = (study_objects(header(), each, flags=[Flag(0)]) for each in (images, images[::-1]))
    assert {k: data_of(v) for k, v in first.items()} == {k: data_of(v) for k, v in second.items()}


@needs_dciodvfy
@pytest.mark.slow
@pytest.mark.parametrize("report", ["sr", "esr"])
def test_dciodvfy_accepts_the_objects(report: Any, tmp_path: Path) -> None:
    first = study_objects(header(), [explained(0)])["study"]
    images = [explained(0, kinds=KINDS, codes=[EFFUSION]), explained(1, multi_frame(), frame=1)]
    made = study_objects(header(), images, report=report, flags=[Flag(0.5)], predecessor=Reference.to(first))
    assert list(made) == ["study", "flagged"]
    for kind, each in made.items():
        assert errors(each, tmp_path) == [], kind
    names = {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "山田^太郎"}
    undated = image(ramp(40, 60), StudyDate="", StudyTime="", **names)
    of_undated = patient_and_study(dicom.read(undated).source)
    for kind, each in study_objects(of_undated, [explained(0, undated)], report=report, flags=[Flag(0)]).items():
        assert errors(each, tmp_path) == [], kind
        assert str(pydicom.dcmread(saved(each, tmp_path)).PatientName) == "山田^太郎"


# ---- flagged images -------------------------------------------------------------------------------------------------


def test_selection_of_flagged_images(tmp_path: Path) -> None:
    images = [explained(0), explained(1, index=4), explained(2, multi_frame(), frame=1)]
    flags = [Flag(0.8, target=4), Flag(0.99, target="effusion")]
    made = study_objects(header(), images, flags=flags)["flagged"]
    document = highdicom.ko.KeyObjectSelectionDocument.from_dataset(pydicom.dcmread(saved(made, tmp_path)))
    assert document.Modality == "KO"
    [reference] = document.content.get_references()
    assert reference.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == f"{INSTANCE}.1"
    assert "any class" not in texts(made)
    assert "class 4, probability at least 0.8; or class effusion, probability at least 0.99" in texts(made)
    assert "RESEARCH USE ONLY" in texts(made)
    [of_frame] = study_objects(header(), images[2:], flags=[Flag(0)])["flagged"].ContentSequence[-1:]
    assert of_frame.ReferencedSOPSequence[0].ReferencedFrameNumber == 2


@pytest.mark.parametrize("flag", [Flag(0.9), Flag(0, target="pneumonia"), Flag(0, target=2), Flag(0, model="other")])
def test_images_that_are_not_flagged(flag: Flag) -> None:
    assert "flagged" not in study_objects(header(), [explained(0)], flags=[flag])


def test_constant_image_is_never_flagged() -> None:
    black = image(ramp(40, 60) * 0, WindowCenter=128, WindowWidth=256)
    assert "flagged" not in study_objects(header(), [explained(0, black)], flags=[Flag(0)])


# ---- codes of classes -----------------------------------------------------------------------------------------------


def findings(made: Dataset) -> set[tuple[str, str, str]]:
    """Return the codes of all findings (Finding, 121071, and Finding Type)."""
    found = set()

    def walk(item: Dataset) -> None:
        if item.get("ValueType") == "CODE" and item.ConceptNameCodeSequence[0].CodeMeaning.startswith("Finding"):
            [code] = item.ConceptCodeSequence
            found.add((code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning))
        for each in item.get("ContentSequence", []):
            walk(each)

    walk(made)
    return found


def test_reports_contain_the_code_of_the_site() -> None:
    rendered = dicom.read(image(ramp(40, 60)))
    of = explanation(rendered.pixels)
    codes = [dicom.ClassCode(3, "RID34539", "RADLEX", "pleural effusion", model="other"), EFFUSION]
    made = dicom.objects(of, rendered, ["sr", "esr"], check=None, class_codes=codes)
    study = study_objects(header(), [explained(0, codes=codes)])["study"]
    for each in (*made.values(), study):
        assert findings(each) == {("60046008", "SCT", "Pleural effusion")}
    plain = dicom.objects(of, rendered, ["sr"], check=None)["sr"]
    assert findings(plain) == {("class-3", "99CAMSERVE", "effusion")}
    assert plain.SOPInstanceUID != made["sr"].SOPInstanceUID


def test_codes_of_other_classes_do_not_change_the_bytes() -> None:
    rendered = dicom.read(image(ramp(40, 60)))
    other = [dicom.ClassCode("pneumonia", "233604007", "SCT", "Pneumonia")]
    first, second = (
        dicom.objects(explanation(rendered.pixels), rendered, ["sr"], check=None, class_codes=codes)["sr"]
        for codes in ([], other)
    )
    assert data_of(first) == data_of(second)


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"code": "60046009"}, "code", "not an identifier of SNOMED CT"),
        ({"code": "60046080"}, "code", "the last is a check digit"),
        ({"code": "6004 6008"}, "code", "without spaces"),
        ({"code": ""}, "code", "expected 1 to 64 characters"),
        ({"scheme": "SNOMED-CT"}, "scheme", "expected the designator SCT"),
        ({"scheme": "RadLex"}, "scheme", "expected the designator RADLEX"),
        ({"scheme": "RADLEX"}, "code", "expected an identifier of RadLex, RID and a number"),
        ({"scheme": "99CAMSERVE"}, "scheme", "expected a Coding Scheme Designator"),
        ({"meaning": " "}, "meaning", "expected 1 to 64 printable characters"),
        ({"meaning": "x" * 65}, "meaning", "expected 1 to 64 printable characters"),
        ({"version": "a\\b"}, "version", "without backslashes"),
    ],
)
def test_invalid_codes(changes: dict[str, str], field: str, said: str) -> None:
    valid = {"target": "effusion", "code": "60046008", "scheme": "SCT", "meaning": "Pleural effusion"}
    with pytest.raises(InvalidArgument, match=said) as wrong:
        dicom.ClassCode(**valid | changes)
    assert wrong.value.field == field


@pytest.mark.parametrize("code", ["404684003", "36118008", "363679005", "900000000000207008"])
def test_identifiers_of_snomed_ct(code: str) -> None:
    dicom.ClassCode("effusion", code, "SCT", "a concept")
