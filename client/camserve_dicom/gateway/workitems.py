"""Requests to a worklist (UPS-RS, DICOM PS3.18 chapter 11), and the images of its workitems (WADO-RS, PS3.18 10.4)."""

from __future__ import annotations

import json
import re
from email.message import Message
from io import BytesIO
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, urlsplit

import structlog
from pydicom import Dataset, Sequence, dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian

from camserve_dicom.gateway.http_requests import MAX_SMALL_BYTES, HttpDestination, Response, TooLarge
from camserve_dicom.gateway.intake import HEADER
from camserve_dicom.gateway.workers import PermanentFailure, TemporaryFailure
from camserve_dicom.gateway.worklist_config import WorklistConfig

__all__ = ["ImageReference", "Unreadable", "Worklist", "input_images"]

log = structlog.get_logger()

DICOM_JSON = "application/dicom+json"
# Workitems that one search returns.
SEARCH_LIMIT = 100
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_PRIORITIES = ("HIGH", "MEDIUM", "LOW")
_STATES = ("SCHEDULED", "IN PROGRESS", "COMPLETED", "CANCELED")


class Unreadable(TemporaryFailure):
    """A response of the worklist that is not DICOM JSON, or not a workitem."""


class ImageReference(NamedTuple):
    """An image of a workitem.

    Attributes:
        study: Study Instance UID.
        series: Series Instance UID.
        sop_instance: SOP Instance UID.
        url: Retrieve URL of the workitem; empty if there is none.
    """

    study: str
    series: str
    sop_instance: str
    url: str


class Worklist:
    """A UPS-RS worklist and the archive of its images. Failures have no content of the responses.

    Args:
        config: The `[worklist]` table.
        max_object_bytes: Maximum size of an image.
    """

    def __init__(self, config: WorklistConfig, max_object_bytes: int) -> None:
        self._config, self._max_object_bytes = config, max_object_bytes
        credentials = (config.ca, config.authorization_file, config.timeout_s)
        self._path = urlsplit(config.url).path.rstrip("/")
        self._http = HttpDestination(config.url, *credentials)
        self.retrieve_url = (config.retrieve_url or config.url).rstrip("/")
        self._images = HttpDestination(self.retrieve_url, *credentials)

    def search(self) -> list[str]:
        """Return the UIDs of scheduled workitems that may fulfil the conditions, by priority and start time.

        Raises:
            TemporaryFailure: If the worklist is not available.
            PermanentFailure: If it refuses the request.
        """
        query = {
            "ProcedureStepState": "SCHEDULED",
            "InputReadinessState": "READY",
            "ScheduledStationNameCodeSequence.CodeValue": self._config.station,
            "ScheduledWorkitemCodeSequence.CodeValue": self._config.workitem_code,
            "WorklistLabel": self._config.label,
            "limit": str(SEARCH_LIMIT),
        }
        text = "&".join(f"{key}={quote(value, safe='')}" for key, value in query.items() if value is not None)
        response = self._request("GET", f"/workitems?{text}")
        if response.status == 204:
            return []
        found = [each for each in _datasets(_require_success(response)) if is_uid(each.get("SOPInstanceUID"))]
        return [str(each.SOPInstanceUID) for each in sorted(found, key=_urgency)]

    def retrieve(self, workitem: str) -> Dataset | None:
        """Return a workitem, or None if it does not exist.

        Raises:
            TemporaryFailure: If the worklist is not available.
            Unreadable: If its response is not a workitem.
            PermanentFailure: If it refuses the request.
        """
        response = self._request("GET", f"/workitems/{workitem}")
        if response.status in (404, 410):
            return None
        datasets = _datasets(_require_success(response))
        # The state is written to the audit trail, so it must not be any other text.
        if len(datasets) != 1 or datasets[0].get("ProcedureStepState") not in _STATES:
            raise Unreadable("the response of the worklist is not a workitem")
        return datasets[0]

    def is_suitable(self, workitem: Dataset) -> bool:
        """Return True if a workitem is scheduled, ready, and fulfils the conditions. Servers may ignore some."""
        return (
            workitem.ProcedureStepState == "SCHEDULED"
            and workitem.get("InputReadinessState") == "READY"
            and self._config.station in (None, *_codes(workitem, "ScheduledStationNameCodeSequence"))
            and self._config.workitem_code in (None, *_codes(workitem, "ScheduledWorkitemCodeSequence"))
            and self._config.label in (None, workitem.get("WorklistLabel"))
        )

    def change_state(self, workitem: str, transaction: str, state: str) -> bool:
        """Change the state of a workitem (PS3.18 11.7).

        Args:
            workitem: UID of the workitem.
            transaction: Transaction UID of the gateway.
            state: "IN PROGRESS", "COMPLETED" or "CANCELED".

        Returns:
            False if the worklist refuses the change.

        Raises:
            TemporaryFailure: If the worklist is not available.
        """
        change = Dataset()
        change.TransactionUID, change.ProcedureStepState = transaction, state
        return self._request("PUT", f"/workitems/{workitem}/state", change).is_success

    def update(self, workitem: str, transaction: str, changes: Dataset) -> bool:
        """Change attributes of a workitem that is in progress (PS3.18 11.6).

        Args:
            workitem: UID of the workitem.
            transaction: Transaction UID of the gateway.
            changes: The new values.

        Returns:
            False if the worklist refuses the change, for example because another performer has claimed the workitem.

        Raises:
            TemporaryFailure: If the worklist is not available.
        """
        # PS3.18 has the Transaction UID in the query, and N-SET in the dataset. Servers expect either of them.
        changes.TransactionUID = transaction
        return self._request("POST", f"/workitems/{workitem}?{transaction}", changes).is_success

    def retrieve_image(self, image: ImageReference) -> tuple[Dataset, bytes]:
        """Retrieve an image from the archive.

        Returns:
            The header with the elements `intake.HEADER`, and the DICOM file.

        Raises:
            TemporaryFailure: If the archive is not available.
            PermanentFailure: If the image cannot be retrieved.
        """
        path = self._images_path(image.url)
        target = f"{path}/studies/{image.study}/series/{image.series}/instances/{image.sop_instance}"
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        try:
            response = self._images.request("GET", target, None, {"Accept": accept}, self._max_object_bytes + 4096)
        except TooLarge as error:
            raise PermanentFailure("the image exceeds max_object_bytes") from error
        part10 = _single_part(_require_success(response))
        # A few kilobytes may inflate to gigabytes. The transfer syntax may be anywhere in the file meta information.
        if DeflatedExplicitVRLittleEndian.encode() in part10:
            raise PermanentFailure("the image is deflated")
        try:
            header = dcmread(BytesIO(part10), specific_tags=[*HEADER])
            uid = str(header.SOPInstanceUID)
        except Exception as error:  # a corrupt header can raise any exception in the parser
            raise PermanentFailure("the image cannot be read") from error
        if uid != image.sop_instance:
            raise PermanentFailure("the archive sent another image")
        return header, part10

    def _images_path(self, url: str) -> str:
        """Return the path of DICOMweb: of the Retrieve URL if it has the scheme, host and port of `retrieve_url`.

        The gateway never connects to another host that a workitem names.
        """
        configured = urlsplit(self.retrieve_url)
        try:
            parts = urlsplit(url)
            same = _origin(parts) == _origin(configured)
        except ValueError:
            same = False
        base, found, _ = parts.path.rpartition("/studies/") if same else ("", "", "")
        return base if found and re.fullmatch(r"[\w/.~%-]*", base, re.ASCII) else configured.path

    def _request(self, method: str, path: str, payload: Dataset | None = None) -> Response:
        headers, body = {"Accept": DICOM_JSON}, None
        if payload is not None:
            headers["Content-Type"] = DICOM_JSON
            body = json.dumps([payload.to_json_dict()]).encode()
        try:
            response = self._http.request(method, self._path + path, body, headers, MAX_SMALL_BYTES)
        except TooLarge as error:
            raise PermanentFailure(str(error)) from error
        if response.is_temporary:
            raise TemporaryFailure(f"worklist: HTTP {response.status}", response.retry_after_s)
        return response


def input_images(workitem: Dataset) -> list[ImageReference]:
    """Return the images of a workitem: the DICOM objects of its Input Information Sequence.

    Raises:
        PermanentFailure: If an item is not a DICOM object with valid UIDs.
    """
    images = {}
    for item in _items(workitem, "InputInformationSequence"):
        urls = [str(each.get("RetrieveURL", "")) for each in _items(item, "WADORSRetrievalSequence")]
        study, series = item.get("StudyInstanceUID"), item.get("SeriesInstanceUID")
        instances = [each.get("ReferencedSOPInstanceUID") for each in _items(item, "ReferencedSOPSequence")]
        if item.get("TypeOfInstances", "DICOM") != "DICOM" or not instances:
            raise PermanentFailure("an input is not a reference to DICOM objects")
        if not all(map(is_uid, (study, series, *instances))):
            raise PermanentFailure("an input has an invalid UID")
        for each in instances:
            images[str(each)] = ImageReference(str(study), str(series), str(each), next(iter(urls), ""))
    return [*images.values()]


def is_uid(value: Any) -> bool:
    """Return True if a value is a UID, which is safe in a path."""
    return len(str(value)) <= 64 and _UID.fullmatch(str(value)) is not None


def _codes(workitem: Dataset, sequence: str) -> list[str]:
    return [str(each.get("CodeValue", "")) for each in _items(workitem, sequence)]


def _items(dataset: Dataset, sequence: str) -> list[Dataset]:
    """Return the items of a sequence. JSON may give an element another value representation, which has no items."""
    value = dataset.get(sequence)
    return [*value] if isinstance(value, Sequence) else []


def _origin(url: SplitResult) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of a URL."""
    return url.scheme, url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _urgency(workitem: Dataset) -> tuple[int, str]:
    priority = workitem.get("ScheduledProcedureStepPriority")
    rank = _PRIORITIES.index(priority) if priority in _PRIORITIES else len(_PRIORITIES)
    return rank, str(workitem.get("ScheduledProcedureStepStartDateTime") or "")


def _require_success(response: Response) -> Response:
    """Return a response with a status from 200 to 299.

    Raises:
        TemporaryFailure: If the request may succeed later.
        PermanentFailure: For any other status.
    """
    if response.is_temporary:
        raise TemporaryFailure(f"HTTP {response.status}", response.retry_after_s)
    if not response.is_success:
        raise PermanentFailure(f"HTTP {response.status}")
    return response


def _datasets(response: Response) -> list[Dataset]:
    """Return the datasets of a response in DICOM JSON. A dataset that cannot be read is left out.

    Raises:
        Unreadable: If the response is not JSON.
    """
    try:
        parsed = json.loads(response.body)
    except (ValueError, RecursionError) as error:
        raise Unreadable("the response of the worklist is not JSON") from error
    datasets = []
    for each in parsed if isinstance(parsed, list) else [parsed]:
        try:
            # A bulk data URI in a workitem is ignored: nothing is retrieved from it.
            datasets.append(Dataset.from_json(each, bulk_data_uri_handler=lambda uri: None))
        except Exception as error:  # an unexpected structure can raise any exception in pydicom
            log.warning("a workitem cannot be read", reason=type(error).__name__)
    return datasets


def _single_part(response: Response) -> bytes:
    """Return the only part of a multipart response, or the body of another one."""
    header = Message()
    header["Content-Type"] = response.content_type
    boundary = header.get_boundary()
    if header.get_content_maintype() != "multipart" or not boundary:
        return response.body
    delimiter = f"--{boundary}".encode()
    begin = response.body.find(delimiter)
    start = response.body.find(b"\r\n\r\n", begin)
    end = response.body.find(b"\r\n" + delimiter, start + 4)
    if min(begin, start, end) < 0:
        raise PermanentFailure("the response of the archive has no part")
    return response.body[start + 4 : end]
