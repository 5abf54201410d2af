"""Empty, incomplete and contradictory attributes of the source never make a result invalid."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.datadict import dictionary_VR

from camserve_dicom import KINDS
from tests.dicom.samples import errors, image, needs_dciodvfy, ramp
from tests.dicom.test_header import copied_modules, make_objects

pytestmark = [pytest.mark.slow, needs_dciodvfy]

OTHERS = [
    "BodyPartExamined", "Laterality", "ImageLaterality", "LossyImageCompression", "LossyImageCompressionRatio",
    "LossyImageCompressionMethod", "PatientOrientation", "PositionReferenceIndicator", "PixelSpacingCalibrationType",
    "PixelSpacingCalibrationDescription", "FrameOfReferenceUID", "RescaleType", "RescaleSlope", "RescaleIntercept",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "SpecificCharacterSet", "PixelSpacing", "SliceThickness",
    "ImagePositionPatient", "ImageOrientationPatient", "NumberOfFrames", "PixelAspectRatio", "ImagerPixelSpacing",
    "PixelPaddingValue", "Modality", "TimezoneOffsetFromUTC",
]  # fmt: skip
# dciodvfy does not know these attributes.
UNKNOWN = {"EthnicGroupCodeSequence", "ClinicalTrialTimePointTypeCodeSequence", "IssuerOfClinicalTrialTimePointID"}
MODULES = sorted({name for names in copied_modules().values() for name in names} - UNKNOWN)
VALUES: dict[str, Any] = {
    "DA": "20240102", "TM": "1112", "AS": "050Y", "US": 4, "FD": 1.5, "UI": "1.2.3", "DT": "2024", "DS": "1.5",
}  # fmt: skip
ENUMERATED = {
    "PatientSex": "F", "PatientIdentityRemoved": "YES", "QualityControlSubject": "NO", "SmokingStatus": "NO",
    "PatientSexNeutered": "ALTERED", "TypeOfPatientID": "TEXT", "ResponsiblePersonRole": "OWNER",
    "PatientAlternativeCalendar": "HIJRI", "LongitudinalTemporalEventType": "ENROLLMENT",
}  # fmt: skip


def source_with(**attributes: Any) -> Dataset:
    """Return an image with these attributes, also if their values violate the standard."""
    source = image(ramp(40, 60))
    for name, value in attributes.items():
        setattr(source, name, value)
    return source


def assert_valid(source: Dataset, folder: Path, kinds: Any = KINDS) -> None:
    for kind, each in make_objects(source, kinds=kinds).items():
        assert errors(each, folder) == [], kind


def code(**attributes: str) -> Dataset:
    item = Dataset()
    for name, value in attributes.items():
        setattr(item, name, value)
    return item


CODE = {"CodeValue": "X1", "CodingSchemeDesignator": "99TEST", "CodeMeaning": "a meaning"}


def value_of(name: str) -> Any:
    if dictionary_VR(name) == "SQ":
        return [code(**CODE)]
    return ENUMERATED.get(name) or VALUES.get(dictionary_VR(name), "1")


def test_all_attributes_are_empty(tmp_path: Path) -> None:
    names = [*MODULES, *OTHERS]
    empty: dict[str, Any] = {name: [] if dictionary_VR(name) == "SQ" else None for name in names}
    del empty["StudyInstanceUID"]
    assert_valid(source_with(**empty), tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_one_attribute_is_empty(name: str, tmp_path: Path) -> None:
    assert_valid(source_with(**{name: [] if dictionary_VR(name) == "SQ" else None}), tmp_path, ["sc", "gsps"])


@pytest.mark.parametrize(
    "item",
    [
        {},
        {"CodeMeaning": "a meaning", "CodeValue": "", "CodingSchemeDesignator": ""},
        {"CodeMeaning": "", "CodeValue": "X", "CodingSchemeDesignator": "99TEST"},
        {"CodeMeaning": "a meaning", "CodeValue": "X"},
        {"PatientID": "", "ReferencedSOPClassUID": "", "LocalNamespaceEntityID": "", "UniversalEntityID": "X"},
    ],
)
def test_items_are_incomplete(item: dict[str, str], tmp_path: Path) -> None:
    sequences = [name for name in MODULES if dictionary_VR(name) == "SQ"]
    assert_valid(source_with(**{name: [code(**item), code(**item)] for name in sequences}), tmp_path)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "StudyInstanceUID"])
def test_one_attribute_of_a_module(name: str, tmp_path: Path) -> None:
    """Other attributes that the standard requires beside it are missing."""
    assert_valid(source_with(**{name: value_of(name)}), tmp_path, ["sc"])


@pytest.mark.parametrize("part", [None, "", "HAND", "CHEST", "XYZ"])
def test_sides_that_contradict_the_body_part(part: str | None, tmp_path: Path) -> None:
    for series, of_image in itertools.product((None, "", "R", "B", "X"), (None, "", "L", "B", "U", "X")):
        given = {"BodyPartExamined": part, "Laterality": series, "ImageLaterality": of_image}
        source = source_with(**{name: value for name, value in given.items() if value is not None})
        assert_valid(source, tmp_path, ["sc", "gsps", "seg"])


@pytest.mark.parametrize(
    "attributes",
    [
        {"LossyImageCompression": "01"},
        {
            "LossyImageCompression": "00",
            "LossyImageCompressionRatio": "10",
            "LossyImageCompressionMethod": "ISO_10918_1",
        },
        {"LossyImageCompressionRatio": "10"},
        {"LossyImageCompression": "01", "LossyImageCompressionRatio": ["10", "3"]},
        {"LossyImageCompression": "01", "LossyImageCompressionMethod": "ISO_10918_1"},
        {"LossyImageCompression": "YES"},
        {"PixelSpacingCalibrationType": "FIDUCIAL"},
        {"PixelSpacingCalibrationDescription": "a coin"},
        {"PatientOrientation": "L"},
        {"PatientOrientation": ["L", ""]},
        {"PatientSpeciesDescription": "Canis"},
        {"PatientSpeciesDescription": "Canis", "ResponsiblePerson": "Owner"},
        {"AdmittingDiagnosesCodeSequence": [code(**CODE, LongCodeValue="X" * 20, URNCodeValue="urn:x")]},
        {"PatientIdentityRemoved": "NO", "DeidentificationMethod": "none"},
    ],
)
def test_contradictions(attributes: dict[str, Any], tmp_path: Path) -> None:
    assert_valid(source_with(**attributes), tmp_path)


def test_complete_attributes_are_copied() -> None:
    """Rules for incomplete attributes do not remove complete ones."""
    trial = {"ClinicalTrialSponsorName": "S", "ClinicalTrialProtocolID": "P", "ClinicalTrialSubjectID": "1"}
    animal = {"PatientSpeciesDescription": "Canis", "ResponsiblePerson": "O", "ResponsiblePersonRole": "OWNER"}
    diagnosis = [code(**CODE)]
    issuer = [code(UniversalEntityID="1.2.3", UniversalEntityIDType="ISO")]
    other = {"AdmittingDiagnosesCodeSequence": diagnosis, "IssuerOfAccessionNumberSequence": issuer}
    given = trial | animal | other
    for kind, each in make_objects(source_with(**given)).items():
        assert {name: each.get(name) for name in given} == given, kind
