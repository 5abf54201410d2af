"""A test server for UPS-RS and WADO-RS, written for these tests. It is not a product that others use.

It implements the transactions Search, Retrieve, Update, Change State and Request Cancellation of DICOM PS3.18
chapter 11, with the rules of PS3.4 CC.2 for states, Transaction UIDs and required attributes. Requests that do not
conform fail.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pydicom import Dataset

from tests.dicom.receivers import QuietHandler
from tests.processes import listening

__all__ = ["UpsServer", "code", "ups_server", "workitem"]

JSON = "application/dicom+json"
BOUNDARY = "boundary-of-the-test-server"
# Keys of Search that PS3.4 Table CC.2.5-3 has, and common query parameters.
KEYS = {
    "ProcedureStepState",
    "InputReadinessState",
    "WorklistLabel",
    "ScheduledStationNameCodeSequence.CodeValue",
    "ScheduledWorkitemCodeSequence.CodeValue",
}
# Attributes that an SCU may change (N-SET in Table CC.2.5-3), as far as the gateway needs them.
CHANGEABLE = {
    "TransactionUID",
    "ProcedureStepProgressInformationSequence",
    "UnifiedProcedureStepPerformedProcedureSequence",
}
DATETIME = re.compile(r"\d{14}(\.\d{1,6})?([+-]\d{4})?")


class Refused(Exception):
    """A request that fails. The arguments are the HTTP status and the reason."""


class Item:
    """A workitem of the server.

    Attributes:
        dataset: Its attributes.
        transaction: Transaction UID of its performer.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.transaction = dataset, ""


class UpsServer:
    """State of the server.

    Attributes:
        url: URL of DICOMweb.
        items: Workitems by UID.
        images: DICOM files by path, for WADO-RS.
        changes: UID, new state and Transaction UID of each change of a state.
        updates: UID and dataset of each update.
        requests: Method and target of each request.
        refusals: Status and reason of each refused request.
        headers: Headers of the last request.
        before: Called with method and target. A number is the status of the response, without any effect.
        loses: Called with method and target after the effect. If it returns True, there is no response.
        raw: Called with method and target. Bytes are sent with status 200 instead of the response.
        ignores: Query keys that the search ignores.
    """

    def __init__(self) -> None:
        self.url = ""
        self.items: dict[str, Item] = {}
        self.images: dict[str, bytes] = {}
        self.changes: list[tuple[str, str, str]] = []
        self.updates: list[tuple[str, Dataset]] = []
        self.requests: list[tuple[str, str]] = []
        self.refusals: list[tuple[int, str]] = []
        self.headers: dict[str, str] = {}
        self.before: Callable[[str, str], int | None] = lambda method, target: None
        self.loses: Callable[[str, str], bool] = lambda method, target: False
        self.raw: Callable[[str, str], bytes | None] = lambda method, target: None
        self.ignores: set[str] = set()
        self.lock = threading.Lock()

    def add(self, dataset: Dataset, *images: Dataset) -> str:
        """Add a scheduled workitem whose input are these images. Return its UID."""
        dataset.InputInformationSequence = [self.reference(each) for each in images]
        self.items[dataset.SOPInstanceUID] = Item(dataset)
        return str(dataset.SOPInstanceUID)

    def reference(self, image: Dataset) -> Dataset:
        """Keep an image for WADO-RS, and return a reference to it."""
        study, series = image.StudyInstanceUID, image.SeriesInstanceUID
        file = BytesIO()
        image.save_as(file, enforce_file_format=True)
        self.images[f"/dicom-web/studies/{study}/series/{series}/instances/{image.SOPInstanceUID}"] = file.getvalue()
        item, instance, access = Dataset(), Dataset(), Dataset()
        instance.ReferencedSOPClassUID, instance.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
        access.RetrieveURL = f"{self.url}/studies/{study}/series/{series}"
        item.TypeOfInstances, item.StudyInstanceUID, item.SeriesInstanceUID = "DICOM", study, series
        item.ReferencedSOPSequence, item.WADORSRetrievalSequence = [instance], [access]
        return item

    def state(self, uid: str) -> str:
        """Return the state of a workitem."""
        return str(self.items[uid].dataset.ProcedureStepState)

    def request_cancel(self, uid: str) -> int:
        """Request the cancellation of a workitem (PS3.18 11.8). Return the HTTP status."""
        with self.lock:
            state = self.state(uid)
            if state == "SCHEDULED":
                self.items[uid].dataset.ProcedureStepState = "CANCELED"
            return 409 if state in ("COMPLETED", "CANCELED") else 202

    # ---- transactions ------------------------------------------------------------------------------------------------

    def search(self, query: str) -> tuple[int, list[Dataset]]:
        """Search (PS3.18 11.9)."""
        keys = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True))
        limit = int(keys.pop("limit", "1000"))
        if unknown := keys.keys() - KEYS:
            raise Refused(400, f"unknown keys {unknown}")
        found = [each.dataset for each in self.items.values() if self._matches(each.dataset, keys)][:limit]
        return (200 if found else 204), found

    def _matches(self, dataset: Dataset, keys: dict[str, str]) -> bool:
        for key in keys.keys() - self.ignores:
            name, _, inner = key.partition(".")
            found = [each.get(inner) for each in dataset.get(name, [])] if inner else [dataset.get(name)]
            if keys[key] not in found:
                return False
        return True

    def change_state(self, uid: str, change: Dataset) -> None:
        """Change the state (PS3.18 11.7, PS3.4 Table CC.2.1-2)."""
        item, old = self._item(uid), self.state(uid)
        new, transaction = change.get("ProcedureStepState"), change.get("TransactionUID")
        if new not in ("IN PROGRESS", "COMPLETED", "CANCELED") or not transaction:
            raise Refused(400, "Transaction UID or state is missing")
        if new == "IN PROGRESS":
            if old != "SCHEDULED":
                raise Refused(409, "0xC302: the UPS is already IN PROGRESS, or in a final state")
            item.transaction = transaction
        elif old == "SCHEDULED":
            raise Refused(409, "0xC310: the UPS is not yet IN PROGRESS")
        elif old == new:
            return  # 0xB304 and 0xB306 are warnings
        elif old != "IN PROGRESS":
            raise Refused(409, "0xC300: the UPS may no longer be updated")
        elif transaction != item.transaction:
            raise Refused(409, "0xC301: the correct Transaction UID was not provided")
        else:
            require_final_state(item.dataset, new)
        item.dataset.ProcedureStepState = new
        self.changes.append((uid, new, transaction))

    def update(self, uid: str, query: str, changes: Dataset) -> None:
        """Update attributes (PS3.18 11.6, PS3.4 CC.2.6)."""
        item = self._item(uid)
        if self.state(uid) != "IN PROGRESS":
            raise Refused(409, "only a UPS in progress is updated by a performer")
        if query != item.transaction or changes.get("TransactionUID", query) != query:
            raise Refused(409, "0xC301: the correct Transaction UID was not provided")
        names = {each.keyword for each in changes}
        if names - CHANGEABLE:
            raise Refused(400, f"0x0106: {names - CHANGEABLE} cannot be changed")
        for name in names - {"TransactionUID"}:
            setattr(item.dataset, name, changes[name].value)
        self.updates.append((uid, changes))

    def _item(self, uid: str) -> Item:
        if uid not in self.items:
            raise Refused(404, "no such workitem")
        return self.items[uid]


def require_final_state(dataset: Dataset, state: str) -> None:
    """Check the attributes that a UPS in a final state must have (the column Final State of Table CC.2.5-3)."""
    try:
        if state == "CANCELED":
            [progress] = dataset.ProcedureStepProgressInformationSequence
            assert DATETIME.fullmatch(progress.ProcedureStepCancellationDateTime)
            [reason] = progress.ProcedureStepDiscontinuationReasonCodeSequence
            _require_code(reason)
            return
        [performed] = dataset.UnifiedProcedureStepPerformedProcedureSequence
        for name in ("PerformedStationNameCodeSequence", "PerformedWorkitemCodeSequence"):
            [item] = performed[name].value
            _require_code(item)
        began, ended = performed.PerformedProcedureStepStartDateTime, performed.PerformedProcedureStepEndDateTime
        assert DATETIME.fullmatch(began) and DATETIME.fullmatch(ended) and began <= ended
        for output in performed.OutputInformationSequence:
            assert output.TypeOfInstances == "DICOM" and output.StudyInstanceUID and output.SeriesInstanceUID
            assert all(
                each.ReferencedSOPClassUID and each.ReferencedSOPInstanceUID for each in output.ReferencedSOPSequence
            )
            assert "DICOMRetrievalSequence" in output or "WADORSRetrievalSequence" in output
    except (AssertionError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise Refused(409, f"0xC304: the UPS does not meet the requirements of {state}: {error!r}") from error


def _require_code(item: Dataset) -> None:
    assert item.CodeValue and item.CodingSchemeDesignator and item.CodeMeaning


def code(value: str) -> Dataset:
    """Return an item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "99TEST", f"Code {value}"
    return item


def workitem(number: int = 1, **attributes: Any) -> Dataset:
    """Return a scheduled workitem for the station CAMSERVE1, without input."""
    made = Dataset()
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.34.6.1", f"1.2.826.0.1.3680043.10.999.5.{number}"
    made.ProcedureStepState, made.InputReadinessState = "SCHEDULED", "READY"
    made.ScheduledProcedureStepPriority, made.WorklistLabel = "MEDIUM", "AI"
    made.ProcedureStepLabel, made.PatientName, made.PatientID = "Saliency", "Zwetschge^Quirin", "Q-4711"
    made.ScheduledStationNameCodeSequence = [code("OTHER"), code("CAMSERVE1")]
    made.ScheduledWorkitemCodeSequence = [code("SALIENCY")]
    made.ScheduledProcedureStepStartDateTime = f"202402031012{number % 60:02}"
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@contextmanager
def ups_server() -> Iterator[UpsServer]:
    """Run the test server on a free port of the loopback address."""
    made = UpsServer()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self._handle()

        def do_POST(self) -> None:
            self._handle()

        def do_PUT(self) -> None:
            self._handle()

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with made.lock:
                made.requests.append((self.command, self.path))
                made.headers = {key.lower(): value for key, value in self.headers.items()}
            if (status := made.before(self.command, self.path)) is not None:
                self._send(status, b"", "text/plain")
                return
            if (data := made.raw(self.command, self.path)) is not None:
                self._send(200, data, JSON)
                return
            try:
                with made.lock:
                    answer = self._answer(body)
            except Refused as refusal:
                status, reason = refusal.args
                made.refusals.append((status, reason))
                answer = (status, b"", "text/plain")
            if not made.loses(self.command, self.path):
                self._send(*answer)

        def _answer(self, body: bytes) -> tuple[int, bytes, str]:
            parts = urlsplit(self.path)
            if self.command == "GET" and parts.path in made.images:
                if "application/dicom" not in self.headers.get("Accept", ""):
                    raise Refused(406, "the client does not accept application/dicom")
                content_type = f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"'
                head = f"preamble\r\n--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
                return 200, head + made.images[parts.path] + f"\r\n--{BOUNDARY}--\r\n".encode(), content_type
            found = re.fullmatch(r"/dicom-web/workitems(?:/([0-9.]+)(/state)?)?", parts.path)
            if found is None:
                raise Refused(404, "no such resource")
            uid, state = found[1], found[2]
            if self.command == "GET":
                if JSON not in self.headers.get("Accept", ""):
                    raise Refused(406, "the client does not accept DICOM JSON")
                status, datasets = made.search(parts.query) if uid is None else (200, [made._item(uid).dataset])
                data = json.dumps([each.to_json_dict() for each in datasets]).encode() if datasets else b""
                return status, data, JSON
            if self.headers.get("Content-Type") != JSON:
                raise Refused(415, "the content is not DICOM JSON")
            [payload] = json.loads(body)
            if self.command == "PUT" and state:
                made.change_state(uid, Dataset.from_json(payload))
            elif self.command == "POST" and uid and not state:
                made.update(uid, parts.query, Dataset.from_json(payload))
            else:
                raise Refused(405, "the resource does not have this method")
            return 200, b"", "text/plain"

        def _send(self, status: int, data: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Ignore a gateway that was killed."""

    with listening(Server(("127.0.0.1", 0), Handler)) as address:
        made.url = f"http://{address}/dicom-web"
        yield made
