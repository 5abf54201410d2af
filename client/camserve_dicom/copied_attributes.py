"""Attributes that results copy from the source: patient, clinical trial, study, laterality and lossy compression.

Empty attributes and attributes that contradict each other are common in real headers. They are left out or completed,
so that they never make a result invalid.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from pydicom import DataElement, Dataset
from pydicom.config import IGNORE
from pydicom.datadict import keyword_for_tag
from pydicom.multival import MultiValue
from pydicom.valuerep import PersonName

from camserve_dicom.source_header import readable_element

__all__ = ["copy_compression", "copy_patient_and_study", "copy_series"]

# Type 2 attributes, which must be present and may be empty (PS3.5 7.4).
_TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName",
    "StudyID", "AccessionNumber",
)  # fmt: skip
_COPIED = (
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
_CODE = (
    "CodeValue", "LongCodeValue", "URNCodeValue", "CodingSchemeDesignator", "CodingSchemeVersion", "CodeMeaning",
)  # fmt: skip
# Sequences that may have one item only.
_ONE_ITEM = (
    "IssuerOfPatientIDQualifiersSequence", "IssuerOfAccessionNumberSequence", "IssuerOfAdmissionIDSequence",
    "IssuerOfServiceEpisodeIDSequence", "AssigningFacilitySequence", "AssigningJurisdictionCodeSequence",
    "AssigningAgencyOrDepartmentCodeSequence", "PatientSpeciesCodeSequence", "BreedRegistryCodeSequence",
    "StrainSourceRegistryCodeSequence", "RequestingServiceCodeSequence", "InstitutionCodeSequence",
)  # fmt: skip
_SOP = ("ReferencedSOPClassUID", "ReferencedSOPInstanceUID")
# Attributes without which an item is invalid. One of the alternatives separated by "|" is enough.
_REQUIRED_IN_ITEMS = {
    "ReferencedStudySequence": _SOP,
    "ReferencedPatientSequence": _SOP,
    "ReferencedSOPSequence": _SOP,
    "ReferencedPatientPhotoSequence": ("TypeOfInstances", "ReferencedSOPSequence", "StudyInstanceUID"),
    "OtherPatientIDsSequence": ("PatientID", "TypeOfPatientID"),
    "SourcePatientGroupIdentificationSequence": ("PatientID",),
    "GroupOfPatientsIdentificationSequence": ("PatientID", "SubjectRelativePositionInImage|PatientPosition"),
    "BreedRegistrationSequence": ("BreedRegistrationNumber", "BreedRegistryCodeSequence"),
    "StrainStockSequence": ("StrainStockNumber", "StrainSource", "StrainSourceRegistryCodeSequence"),
    "GeneticModificationsSequence": ("GeneticModificationsDescription", "GeneticModificationsNomenclature"),
    "OtherClinicalTrialProtocolIDsSequence": ("ClinicalTrialProtocolID", "IssuerOfClinicalTrialProtocolID"),
    "ConsentForClinicalTrialUseSequence": ("ConsentForDistributionFlag",),
    **dict.fromkeys(
        (
            "ReferringPhysicianIdentificationSequence", "ConsultingPhysicianIdentificationSequence",
            "PhysiciansOfRecordIdentificationSequence", "PhysiciansReadingStudyIdentificationSequence",
        ),
        ("PersonIdentificationCodeSequence", "InstitutionName|InstitutionCodeSequence"),
    ),
    **dict.fromkeys(
        (
            "IssuerOfAccessionNumberSequence", "IssuerOfAdmissionIDSequence", "IssuerOfServiceEpisodeIDSequence",
            "AssigningFacilitySequence",
        ),
        ("LocalNamespaceEntityID|UniversalEntityID",),
    ),
}  # fmt: skip
# Attributes that need others. Without one of the alternatives, the attribute is left out. The order matters.
_NEEDS = {
    "UniversalEntityID": "UniversalEntityIDType",
    "UniversalEntityIDType": "UniversalEntityID",
    "PatientAlternativeCalendar": "PatientBirthDateInAlternativeCalendar|PatientDeathDateInAlternativeCalendar",
    "PatientBirthDateInAlternativeCalendar": "PatientAlternativeCalendar",
    "PatientDeathDateInAlternativeCalendar": "PatientAlternativeCalendar",
    "ResponsiblePersonRole": "ResponsiblePerson",
    "LongitudinalTemporalOffsetFromEvent": "LongitudinalTemporalEventType",
    "LongitudinalTemporalEventType": "LongitudinalTemporalOffsetFromEvent",
}
_ANIMAL = (
    "PatientBreedDescription", "PatientBreedCodeSequence", "BreedRegistrationSequence", "StrainDescription",
    "StrainNomenclature", "StrainStockSequence", "StrainAdditionalInformation", "StrainCodeSequence",
    "GeneticModificationsSequence", "PatientSexNeutered",
)  # fmt: skip
_TRIAL_SUBJECT = (
    "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName",
    "IssuerOfClinicalTrialProtocolID", "OtherClinicalTrialProtocolIDsSequence", "ClinicalTrialSiteID",
    "ClinicalTrialSiteName", "IssuerOfClinicalTrialSiteID", "ClinicalTrialSubjectID",
    "IssuerOfClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID", "IssuerOfClinicalTrialSubjectReadingID",
    "ClinicalTrialProtocolEthicsCommitteeName", "ClinicalTrialProtocolEthicsCommitteeApprovalNumber",
)  # fmt: skip
_TRIAL_STUDY = (
    "ClinicalTrialTimePointID", "IssuerOfClinicalTrialTimePointID", "ClinicalTrialTimePointDescription",
    "ClinicalTrialTimePointTypeCodeSequence", "LongitudinalTemporalOffsetFromEvent", "LongitudinalTemporalEventType",
    "ConsentForClinicalTrialUseSequence",
)  # fmt: skip
# Values of Body Part Examined whose parts are single. Laterality is absent for these, and present for all others.
_UNPAIRED_PARTS = (
    "ABDOMEN", "ABDOMENPELVIS", "AORTA", "BACK", "BLADDER", "BRAIN", "CEREBELLUM", "CERVIX", "CHEST",
    "CHESTABDOMEN", "CHESTABDPELVIS", "CIRCLEOFWILLIS", "COCCYX", "COLON", "CORONARYARTERY", "CSPINE", "CTSPINE",
    "DUODENUM", "ESOPHAGUS", "FACE", "GALLBLADDER", "HEAD", "HEADNECK", "HEART", "ILEUM", "ILIUM", "JAW", "JEJUNUM",
    "LARYNX", "LIVER", "LSPINE", "LSSPINE", "MAXILLA", "MEDIASTINUM", "MOUTH", "NECK", "NECKCHEST",
    "NECKCHESTABDOMEN", "NECKCHESTABDPELV", "NOSE", "PANCREAS", "PELVIS", "PENIS", "PHARYNX", "PROSTATE", "RECTUM",
    "SCALP", "SKULL", "SPINE", "SPLEEN", "SSPINE", "STERNUM", "STOMACH", "THYMUS", "THYROID", "TLSPINE", "TONGUE",
    "TRACHEA", "TSPINE", "URETER", "URETHRA", "UTERUS", "VAGINA", "VULVA", "WHOLEBODY",
)  # fmt: skip


def copy_patient_and_study(source: Dataset, result: Dataset) -> None:
    """Copy the attributes of patient, clinical trial and study. Values are copied even if they violate the standard.

    Args:
        source: The header of the source.
        result: A result, which is changed.
    """
    _copy_elements(source, result, _COPIED)
    if "ResponsiblePersonRole" not in result:  # it is required beside the name
        result.pop("ResponsiblePerson", None)
    _complete_animal(result)
    _complete_trial(result)
    if str(result.get("PatientIdentityRemoved") or "") == "YES" and not _has(
        result, "DeidentificationMethod|DeidentificationMethodCodeSequence"
    ):
        result.DeidentificationMethod = "not stated"
    for name in _TYPE_2:
        if name not in result:
            setattr(result, name, None)


def _complete_animal(result: Dataset) -> None:
    """Add the attributes that are required for an animal, or remove those of animals if there is no species."""
    if not _has(result, "PatientSpeciesDescription|PatientSpeciesCodeSequence"):
        for name in _ANIMAL:
            result.pop(name, None)
        return
    for name in ("PatientBreedCodeSequence", "BreedRegistrationSequence"):
        if name not in result:
            setattr(result, name, [])
    for name in ("ResponsiblePerson", "ResponsibleOrganization", "PatientSexNeutered"):
        if name not in result:
            setattr(result, name, None)
    if not result.PatientBreedCodeSequence and "PatientBreedDescription" not in result:
        result.PatientBreedDescription = None
    if "StrainCodeSequence" in result and "StrainNomenclature" not in result:
        del result.StrainCodeSequence


def _complete_trial(result: Dataset) -> None:
    """Add attributes of clinical trials that may be empty, or remove the module if it lacks others."""
    if any(name in result for name in _TRIAL_SUBJECT):
        if all(
            _has(result, name)
            for name in (
                "ClinicalTrialSponsorName",
                "ClinicalTrialProtocolID",
                "ClinicalTrialSubjectID|ClinicalTrialSubjectReadingID",
            )
        ):
            for name in ("ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName"):
                if name not in result:
                    setattr(result, name, None)
            if "ClinicalTrialProtocolEthicsCommitteeName" not in result:
                result.pop("ClinicalTrialProtocolEthicsCommitteeApprovalNumber", None)
        else:
            for name in _TRIAL_SUBJECT:
                result.pop(name, None)
    if any(name in result for name in _TRIAL_STUDY) and "ClinicalTrialTimePointID" not in result:
        result.ClinicalTrialTimePointID = None


def copy_series(header: Dataset, result: Dataset, kind: str) -> None:
    """Copy Body Part Examined, and set Image Laterality of images or Laterality of the series.

    Laterality is type 2C (PS3.3 C.7.3.1): it is absent for unpaired body parts, and empty if the side is unknown.
    Reports and segmentations have no Laterality. A side that contradicts the body part is left out.

    Args:
        header: The header of the frame.
        result: A result, which is changed.
        kind: The kind of the result, see `camserve_dicom.KINDS`.
    """
    _copy_elements(header, result, ["BodyPartExamined"])
    side = str(header.get("ImageLaterality") or header.get("FrameLaterality") or "").strip().upper()
    result.pop("Laterality", None)
    if side in ("R", "L", "B", "U") and kind not in ("sr", "esr", "gsps", "pdf"):
        result.ImageLaterality = side
    elif (
        kind not in ("sr", "esr", "seg", "pdf")
        and str(result.get("BodyPartExamined") or "").upper() not in _UNPAIRED_PARTS
    ):
        series_side = str(header.get("Laterality") or "").strip().upper()
        known = [each for each in (side, series_side) if each in ("R", "L")]
        result.Laterality = known[0] if known and side not in ("B", "U") else None


def copy_compression(source: Dataset, result: Dataset) -> None:
    """Copy the attributes of lossy compression.

    Args:
        source: The header of the source.
        result: An image, which is changed.
    """
    if source.get("LossyImageCompression") not in ("00", "01"):
        return
    result.LossyImageCompression = source.LossyImageCompression
    names = ("LossyImageCompressionRatio", "LossyImageCompressionMethod")
    if result.LossyImageCompression == "01":
        _copy_elements(source, result, names)


def _copy_elements(source: Dataset, result: Dataset, names: Iterable[str]) -> None:
    """Copy elements that have a value.

    Texts are decoded, so that any character set can encode them. Elements that cannot be parsed, such as the number
    "63,2", are left out.
    """
    for name in names:
        element = readable_element(source, name)
        if element is None or element.is_empty:
            continue
        if element.VR == "SQ":
            if items := _copied_items(element):
                setattr(result, name, items)
        else:
            with suppress(TypeError, ValueError, OverflowError):
                result.add(DataElement(element.tag, element.VR, _decoded(element.value), validation_mode=IGNORE))
    for name, needed in _NEEDS.items():
        if name in result and not _has(result, needed):
            delattr(result, name)


def _copied_items(sequence: DataElement) -> list[Dataset]:
    """Return copies of the items of a sequence that are complete."""
    is_code = sequence.keyword.endswith("CodeSequence")
    items = []
    for original in sequence.value:
        item = Dataset()
        _copy_elements(original, item, _CODE if is_code else filter(None, map(keyword_for_tag, original.keys())))
        complete = (
            _completes_code(item)
            if is_code
            else all(_has(item, each) for each in _REQUIRED_IN_ITEMS.get(sequence.keyword, ()))
        )
        if complete and len(item):
            items.append(item)
    return items[:1] if sequence.keyword in _ONE_ITEM else items


def _completes_code(item: Dataset) -> bool:
    """Remove all but one form of the value of a code, and return True if the code is complete (PS3.3 8)."""
    value = next((name for name in _CODE[:3] if name in item), None)
    for name in _CODE[:3]:
        if name != value:
            item.pop(name, None)
    return value is not None and "CodeMeaning" in item and ("CodingSchemeDesignator" in item or value == "URNCodeValue")


def _has(dataset: Dataset, alternatives: str) -> bool:
    """Return True if one of the attributes, separated by "|", has a value."""
    return any(name in dataset and not dataset[name].is_empty for name in alternatives.split("|"))


def _decoded(value: object) -> object:
    """Return person names without their original encoding."""
    if isinstance(value, MultiValue):
        return [_decoded(each) for each in value]
    return PersonName(str(value), validation_mode=IGNORE) if isinstance(value, PersonName) else value
