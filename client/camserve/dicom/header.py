"""What results take over from the header of their source, and what all of them say of themselves."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import suppress

import pydicom
from pydicom import DataElement, Dataset
from pydicom.charset import python_encoding
from pydicom.config import IGNORE
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.uid import UID, ExplicitVRLittleEndian
from pydicom.valuerep import PersonName

from camserve.dicom import grey
from camserve.dicom.derivation import IMPLEMENTATION_UID, Derivation
from camserve.version import __version__

__all__ = ["code", "finished", "reference"]

# Attributes that must be there, if only empty.
_TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName",
    "StudyID", "AccessionNumber",
)  # fmt: skip
_CARRIED = (
    *_TYPE_2,
    # Patient
    "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "TypeOfPatientID", "PatientBirthTime",
    "PatientBirthDateInAlternativeCalendar", "OtherPatientIDs", "OtherPatientIDsSequence", "OtherPatientNames",
    "EthnicGroup", "PatientComments", "QualityControlSubject", "PatientIdentityRemoved", "DeidentificationMethod",
    "DeidentificationMethodCodeSequence", "PatientSpeciesDescription", "PatientSpeciesCodeSequence",
    "PatientBreedDescription", "PatientBreedCodeSequence", "BreedRegistrationSequence", "ResponsiblePerson",
    "ResponsiblePersonRole", "ResponsibleOrganization", "ReferencedPatientSequence",
    # Clinical trial
    "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID",
    "ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID", "ClinicalTrialTimePointID",
    "ClinicalTrialTimePointDescription",
    # Study
    "StudyInstanceUID", "StudyDescription", "IssuerOfAccessionNumberSequence", "ProcedureCodeSequence",
    "PhysiciansOfRecord", "PhysiciansOfRecordIdentificationSequence", "NameOfPhysiciansReadingStudy",
    "ReferringPhysicianIdentificationSequence", "ReferencedStudySequence",
    # Patient's study
    "AdmittingDiagnosesDescription", "AdmittingDiagnosesCodeSequence", "PatientAge", "PatientSize", "PatientWeight",
    "Occupation", "AdditionalPatientHistory", "AdmissionID", "IssuerOfAdmissionIDSequence", "ServiceEpisodeID",
    "ServiceEpisodeDescription", "PatientSexNeutered",
    "TimezoneOffsetFromUTC",
)  # fmt: skip
_OF_SERIES = ("BodyPartExamined", "Laterality")
_OF_IMAGE = ("ImageLaterality", "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
# In the order of their series' numbers.
_NUMBERS = {"sc": 9001, "sr": 9002, "pm": 9003, "seg": 9004, "gsps": 9005}
_NAMES = {"sc": "overlay", "sr": "report", "pm": "map", "seg": "segmentation", "gsps": "annotation"}


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """An item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def reference(derivation: Derivation) -> Dataset:
    """The source as an item of a sequence of references."""
    source = derivation.picture.source
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    if derivation.frame_number:
        item.ReferencedFrameNumber = derivation.frame_number
    return item


def finished(result: Dataset, kind: str, derivation: Derivation) -> Dataset:
    """The result with all that it has in common with others, ready to be written, and read back as it is written."""
    source = derivation.picture.source
    _carry(source, result, _CARRIED)
    for name in _TYPE_2:
        if name not in result:
            setattr(result, name, None)
    _carry(source, result, _OF_SERIES)
    if "PixelData" in result or "FloatPixelData" in result:
        _carry(source, result, _OF_IMAGE)
    _laterality(result, kind, source)
    result.SeriesInstanceUID = derivation.uid(f"{kind}/series")
    result.SOPInstanceUID = derivation.uid(kind)
    result.SeriesNumber, result.InstanceNumber = _NUMBERS[kind], 1
    receipt = derivation.explanation.receipt
    result.SeriesDescription = f"camserve {_NAMES[kind]} {receipt.method}"[:53] + " (research)"
    _time(result, derivation)
    result.Manufacturer, result.ManufacturerModelName = "camserve", receipt.model[:64]
    result.DeviceSerialNumber = receipt.model_digest.removeprefix("sha256:")[:64]
    result.SoftwareVersions = derivation.software
    result.ContributingEquipmentSequence = [_equipment(derivation)]
    _charset(result, str(source.get("SpecificCharacterSet") or ""))
    return _written(result)


def _laterality(result: Dataset, kind: str, source: Dataset) -> None:
    """Type 2C: of paired body parts, empty where it is not known whether it is one; these two kinds have none."""
    if kind in ("sr", "seg"):
        result.pop("Laterality", None)
    elif "ImageLaterality" in result:
        result.pop("Laterality", None)  # one of them, not both
    elif source.get("ImageLaterality"):  # which a presentation state has not
        result.Laterality = source.ImageLaterality
    elif "BodyPartExamined" not in result and "Laterality" not in result:
        result.Laterality = None


def _time(result: Dataset, derivation: Derivation) -> None:
    date, time = derivation.moment.strftime("%Y%m%d"), derivation.moment.strftime("%H%M%S")
    for name in ("Series", "Content", "InstanceCreation", "PresentationCreation"):
        if name in ("Series", "InstanceCreation") or f"{name}Date" in result:
            setattr(result, f"{name}Date", date)
            setattr(result, f"{name}Time", time)
    for element in result.iterall():
        if element.keyword == "DimensionOrganizationUID":
            element.value = derivation.uid("dimensions")


def _equipment(derivation: Derivation) -> Dataset:
    """Who did this, by what: with the receipt in full, as private elements for programs."""
    receipt = derivation.explanation.receipt
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [code("109102", "DCM", "Processing Equipment")]
    item.Manufacturer, item.ManufacturerModelName = "camserve", receipt.model[:64]
    item.DeviceSerialNumber = receipt.model_digest.removeprefix("sha256:")[:64]
    item.SoftwareVersions = derivation.software
    maps = " ".join(receipt.map_digests)
    item.ContributionDescription = (
        f"Saliency map by {receipt.method} of model {receipt.model} ({receipt.model_digest}), "
        f"input {receipt.input_digest}, map {maps}, preprocessing {receipt.preprocessing}"
    )[:1024]
    item.private_block(0x0099, "camserve", create=True).add_new(0x01, "UT", derivation.receipt)
    return item


def _carry(source: Dataset, result: Dataset, names: Iterable[str]) -> None:
    """Copies the elements as they are, even where the standard would have them otherwise.

    They are decoded, so that any character set can hold them. What cannot be read, a number "63,2", is left out.
    """
    for name in names:
        element = grey.readable(source, name)
        if element is None:
            continue
        if element.VR == "SQ":
            items = [Dataset() for _ in element.value]
            for item, original in zip(items, element.value, strict=True):
                _carry(original, item, filter(None, map(keyword_for_tag, original.keys())))
            setattr(result, name, items)
        else:
            with suppress(TypeError, ValueError, OverflowError):
                result.add(DataElement(element.tag, element.VR, _decoded(element.value), validation_mode=IGNORE))


def _decoded(value: object) -> object:
    if isinstance(value, MultiValue):
        return [_decoded(each) for each in value]
    return PersonName(str(value), validation_mode=IGNORE) if isinstance(value, PersonName) else value


def _charset(result: Dataset, declared: str) -> None:
    """The source's character set where that holds all of the result, or else UTF-8."""
    texts = [str(each) for each in _texts(result)]
    if all(text.isascii() for text in texts) and not declared:
        result.pop("SpecificCharacterSet", None)
        return
    codec = python_encoding.get(declared) if declared else None
    try:
        for text in texts:
            text.encode(codec or "")
    except (UnicodeEncodeError, LookupError):
        declared = "ISO_IR 192"
    result.SpecificCharacterSet = declared


def _texts(dataset: Dataset) -> Iterator[object]:
    for element in dataset.iterall():
        if element.VR in ("LO", "LT", "PN", "SH", "ST", "UC", "UT") and element.value:
            yield from element.value if isinstance(element.value, MultiValue) else [element.value]


def _written(result: Dataset) -> Dataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UID(result.SOPClassUID)
    meta.MediaStorageSOPInstanceUID = result.SOPInstanceUID
    meta.ImplementationClassUID = IMPLEMENTATION_UID
    meta.ImplementationVersionName = f"CAMSERVE_{__version__}"[:16]
    plain = Dataset()
    plain.update(result)
    plain.file_meta = meta
    plain.preamble = b"\0" * 128
    file = io.BytesIO()
    plain.save_as(file, implicit_vr=False, little_endian=True, enforce_file_format=True)
    return pydicom.dcmread(io.BytesIO(file.getvalue()))
