"""Attributes of a workitem that its performer sets (DICOM PS3.4, Table CC.2.5-3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from camserve_dicom.gateway.config import Config

__all__ = ["Reason", "canceled", "completed", "now", "progress"]


class Reason:
    """Reasons for the cancellation of a workitem (CID 9300)."""

    not_retrieved: Code = codes.DCM.ObjectSetIncomplete
    not_supported: Code = codes.DCM.ObjectTypesNotSupported
    bad_references: Code = codes.DCM.ObjectsIncorrectlyFormatted
    failed: Code = codes.DCM.DiscontinuedForUnspecifiedReason


def now() -> str:
    """Return the current time as a value of VR DT."""
    return datetime.now(UTC).strftime("%Y%m%d%H%M%S.%f+0000")


def progress(percent: int, description: str) -> Dataset:
    """Return the progress of a workitem.

    Args:
        percent: From 0 to 100.
        description: Text about the progress.
    """
    item = Dataset()
    item.ProcedureStepProgress = percent
    item.ProcedureStepProgressDescription = description
    changes = Dataset()
    changes.ProcedureStepProgressInformationSequence = [item]
    return changes


def completed(
    workitem: Dataset,
    config: Config,
    began: str,
    results: Iterable[Mapping[str, str]],
    retrieve_url: str,
    description: str,
) -> Dataset:
    """Return the attributes that a completed workitem must have.

    Args:
        workitem: The workitem.
        config: The configuration.
        began: Time of the claim, a value of VR DT.
        results: UIDs of the results, from `claimed.results_of`.
        retrieve_url: URL of DICOMweb that has the results.
        description: Text about the result, up to 64 characters.
    """
    performed = Dataset()
    performed.PerformedStationNameCodeSequence = [_station(workitem, config)]
    performed.PerformedProcedureStepStartDateTime = began
    performed.PerformedProcedureStepEndDateTime = now()
    performed.PerformedProcedureStepDescription = description
    performed.PerformedWorkitemCodeSequence = workitem.get("ScheduledWorkitemCodeSequence") or [
        _code_item(codes.DCM.ImageProcessing)
    ]
    performed.OutputInformationSequence = [_output(each, config, retrieve_url) for each in results]
    changes = progress(100, description)
    changes.UnifiedProcedureStepPerformedProcedureSequence = [performed]
    return changes


def canceled(percent: int, reason: Code, text: str) -> Dataset:
    """Return the attributes that a canceled workitem must have.

    Args:
        percent: Progress from 0 to 100.
        reason: One of `Reason`.
        text: Reason for Cancellation, without content of headers.
    """
    changes = progress(percent, text)
    [item] = changes.ProcedureStepProgressInformationSequence
    item.ProcedureStepCancellationDateTime = now()
    item.ReasonForCancellation = text
    item.ProcedureStepDiscontinuationReasonCodeSequence = [_code_item(reason)]
    return changes


def _station(workitem: Dataset, config: Config) -> Dataset:
    """Return the code of the gateway: the scheduled one that the configuration has, otherwise its AE title."""
    station = config.worklist.station if config.worklist is not None else None
    for each in workitem.get("ScheduledStationNameCodeSequence") or []:
        if station is not None and each.get("CodeValue") == station:
            return Dataset(each)
    return _code_item(Code(config.ae_title, "99CAMSERVE", config.ae_title))


def _output(result: Mapping[str, str], config: Config, retrieve_url: str) -> Dataset:
    """Return a reference to a result (PS3.3, Table 10-3b)."""
    reference, access, item = Dataset(), Dataset(), Dataset()
    reference.ReferencedSOPClassUID = result["SOPClassUID"]
    reference.ReferencedSOPInstanceUID = result["SOPInstanceUID"]
    item.TypeOfInstances = "DICOM"
    item.StudyInstanceUID, item.SeriesInstanceUID = result["StudyInstanceUID"], result["SeriesInstanceUID"]
    item.ReferencedSOPSequence = [reference]
    if config.pacs.ae_title is not None:
        access.RetrieveAETitle = config.pacs.ae_title
        item.DICOMRetrievalSequence = [access]
    else:
        access.RetrieveURL = f"{retrieve_url}/studies/{item.StudyInstanceUID}/series/{item.SeriesInstanceUID}"
        item.WADORSRetrievalSequence = [access]
    return item


def _code_item(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item
