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

from camserve.version import __version__
from camserve_dicom import grey
from camserve_dicom.derivation import IMPLEMENTATION_UID, NO_DATE, Derivation

__all__ = ["code", "finished", "reference", "source_image"]

# Attributes that must be there, if only empty.
_TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName",
    "StudyID", "AccessionNumber",
)  # fmt: skip
_CARRIED = (
    *_TYPE_2,
    # Patient
    "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "TypeOfPatientID", "PatientBirthTime",
    "PatientBirthDateInAlternativeCalendar", "PatientDeathDateInAlternativeCalendar", "PatientAlternativeCalendar",
    "OtherPatientIDs", "OtherPatientIDsSequence", "OtherPatientNames", "EthnicGroup", "EthnicGroupCodeSequence",
    "PatientComments", "QualityControlSubject", "PatientIdentityRemoved", "DeidentificationMethod",
    "DeidentificationMethodCodeSequence", "PatientSpeciesDescription", "PatientSpeciesCodeSequence",
    "PatientBreedDescription", "PatientBreedCodeSequence", "BreedRegistrationSequence", "StrainDescription",
    "StrainNomenclature", "StrainStockSequence", "StrainAdditionalInformation", "StrainCodeSequence",
    "GeneticModificationsSequence", "ResponsiblePerson", "ResponsiblePersonRole", "ResponsibleOrganization",
    "ReferencedPatientSequence", "ReferencedPatientPhotoSequence", "SourcePatientGroupIdentificationSequence",
    "GroupOfPatientsIdentificationSequence",
    # Clinical trial: subject and study
    "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName",
    "IssuerOfClinicalTrialProtocolID", "OtherClinicalTrialProtocolIDsSequence", "ClinicalTrialSiteID",
    "ClinicalTrialSiteName", "IssuerOfClinicalTrialSiteID", "ClinicalTrialSubjectID",
    "IssuerOfClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID", "IssuerOfClinicalTrialSubjectReadingID",
    "ClinicalTrialProtocolEthicsCommitteeName", "ClinicalTrialProtocolEthicsCommitteeApprovalNumber",
    "ClinicalTrialTimePointID", "IssuerOfClinicalTrialTimePointID", "ClinicalTrialTimePointDescription",
    "ClinicalTrialTimePointTypeCodeSequence", "LongitudinalTemporalOffsetFromEvent", "LongitudinalTemporalEventType",
    "ConsentForClinicalTrialUseSequence",
    # Study
    "StudyInstanceUID", "StudyDescription", "IssuerOfAccessionNumberSequence", "ProcedureCodeSequence",
    "ReasonForPerformedProcedureCodeSequence", "RequestingService", "RequestingServiceCodeSequence",
    "ReferringPhysicianIdentificationSequence", "ConsultingPhysicianName",
    "ConsultingPhysicianIdentificationSequence", "PhysiciansOfRecord", "PhysiciansOfRecordIdentificationSequence",
    "NameOfPhysiciansReadingStudy", "PhysiciansReadingStudyIdentificationSequence", "ReferencedStudySequence",
    # Patient's study
    "AdmittingDiagnosesDescription", "AdmittingDiagnosesCodeSequence", "PatientAge", "PatientSize",
    "PatientSizeCodeSequence", "PatientWeight", "PatientBodyMassIndex", "MeasuredAPDimension",
    "MeasuredLateralDimension", "MedicalAlerts", "Allergies", "SmokingStatus", "PregnancyStatus", "LastMenstrualDate",
    "PatientState", "ReasonForVisit", "ReasonForVisitCodeSequence", "Occupation", "AdditionalPatientHistory",
    "AdmissionID", "IssuerOfAdmissionIDSequence", "ServiceEpisodeID", "IssuerOfServiceEpisodeIDSequence",
    "ServiceEpisodeDescription", "PatientSexNeutered",
    "TimezoneOffsetFromUTC",
)  # fmt: skip
# Of these pydicom takes codecs that hold more characters than they do.
_ASCII = ("", "ISO_IR 6", "ISO 2022 IR 6", "ISO_IR 13", "ISO 2022 IR 13")
_OF_SERIES = ("BodyPartExamined", "Laterality")
_OF_IMAGE = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
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
    source = derivation.image.source
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    if derivation.frame_number:
        item.ReferencedFrameNumber = derivation.frame_number
    return item


def source_image(derivation: Derivation) -> Dataset:
    """The same, with what for."""
    item = reference(derivation)
    item.PurposeOfReferenceCodeSequence = [code("121322", "DCM", "Source image for image processing operation")]
    return item


def finished(result: Dataset, kind: str, derivation: Derivation) -> Dataset:
    """The result with all that it has in common with others, ready to be written, and read back as it is written."""
    source = derivation.image.source
    _carry(source, result, _CARRIED)
    for name in _TYPE_2:
        if name not in result:
            setattr(result, name, None)
    _carry(source, result, _OF_SERIES)
    if "PixelData" in result or "FloatPixelData" in result:
        _carry(source, result, _OF_IMAGE)
    _laterality(result, kind, _side(derivation))
    result.SeriesInstanceUID = derivation.uid(f"{kind}/series")
    result.SOPInstanceUID = derivation.uid(kind)
    result.SeriesNumber, result.InstanceNumber = _NUMBERS[kind], 1
    receipt = derivation.explanation.receipt
    result.SeriesDescription = f"camserve {_NAMES[kind]} {receipt.method}"[:53] + " (research)"
    _time(result, kind, derivation)
    for element in result.iterall():
        if element.keyword == "DimensionOrganizationUID":
            element.value = derivation.uid(f"{kind}/dimensions")
    result.Manufacturer, result.ManufacturerModelName = "camserve", receipt.model[:64]
    result.DeviceSerialNumber = receipt.model_digest.removeprefix("sha256:")[:64]
    result.SoftwareVersions = derivation.software
    result.ContributingEquipmentSequence = [_equipment(derivation)]
    _charset(result, str(source.get("SpecificCharacterSet") or ""))
    return _written(result)


def _side(derivation: Derivation) -> str:
    """Of the image, or of the frame, of which enhanced objects say it: R, L, B (both) or U (of no pair)."""
    header = grey.of_frame(derivation.image.source, derivation.image.frame)
    return str(header.get("ImageLaterality") or header.get("FrameLaterality") or "")


def _laterality(result: Dataset, kind: str, side: str) -> None:
    """Of the image, where there is one; or else of the series, which has no word for both sides (B) or for no pair (U).

    That is type 2C: of paired body parts, empty where it is not known whether it is one; these two kinds have none.
    """
    if side and kind not in ("sr", "gsps"):
        result.ImageLaterality = side
    elif side in ("R", "L", "B"):
        result.Laterality = None if side == "B" else side
    elif "BodyPartExamined" not in result and "Laterality" not in result:
        result.Laterality = None
    if kind in ("sr", "seg") or "ImageLaterality" in result:
        result.pop("Laterality", None)


def _time(result: Dataset, kind: str, derivation: Derivation) -> None:
    for name in ("Series", "InstanceCreation", "Content", "PresentationCreation"):
        needed = name == "PresentationCreation" or (name == "Content" and kind != "sc")
        moment = derivation.moment or (NO_DATE if needed else None)
        if moment is None:
            result.pop(f"{name}Date", None)
            result.pop(f"{name}Time", None)
        elif f"{name}Date" in result or not needed:
            setattr(result, f"{name}Date", moment.strftime("%Y%m%d"))
            setattr(result, f"{name}Time", moment.strftime("%H%M%S"))


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
    codec = "ascii" if declared in _ASCII else python_encoding.get(declared)
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
