"""A PACS and a modality in the process of a test, which use real associations."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, AllStoragePresentationContexts, build_role, evt
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    Verification,
)

from tests.processes import LIMIT_S, free_port

NAME = "Zwetschge^Quirin"


def image(number: int = 0, **attributes: Any) -> Dataset:
    """Return a CR image of 48×40 pixels. Each number gives another object of the same study."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID = ComputedRadiographyImageStorage
    made.SOPInstanceUID = f"1.2.826.0.1.3680043.10.999.3.{number + 1}"
    made.StudyInstanceUID = "1.2.826.0.1.3680043.10.999.1"
    made.SeriesInstanceUID = "1.2.826.0.1.3680043.10.999.2"
    made.PatientName, made.PatientID, made.PatientBirthDate, made.PatientSex = NAME, "Q-4711", "19470229", "O"
    made.AccessionNumber, made.StudyID, made.ReferringPhysicianName = "A-4712", "S", "Mirabelle^Frieda"
    made.StudyDate, made.StudyTime, made.SeriesNumber, made.InstanceNumber = "20240203", "101112", 1, number + 1
    made.Modality, made.BodyPartExamined, made.Manufacturer = "CR", "CHEST", "Obstgarten"
    made.ImageType = ["ORIGINAL", "PRIMARY"]
    made.PatientOrientation = ["L", "F"]
    made.Rows, made.Columns, made.SamplesPerPixel, made.PhotometricInterpretation = 48, 40, 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    pixels = np.random.default_rng(number).integers(0, 4096, (48, 40), dtype=np.uint16)
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OW"
    for key, value in attributes.items():
        setattr(made, key, value)
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    return made


def send(
    address: str, *images: Dataset, calling: str = "MODALITY", called: str = "CAMSERVE", tls: Any = None
) -> list[int | None]:
    """Send images as a modality in one association.

    Returns:
        The status of each image, None without a response; an empty list if the association is refused.
    """
    host, port = address.split(":")
    modality = AE(calling)
    for each in images:
        modality.add_requested_context(each.SOPClassUID, each.file_meta.TransferSyntaxUID)
    association = modality.associate(host, int(port), ae_title=called, tls_args=tls)
    if not association.is_established:
        return []
    statuses: list[int | None] = []
    for each in images:
        if not association.is_established:
            break
        try:
            with parked(association):
                statuses.append(association.send_c_store(each).get("Status"))
        except RuntimeError:  # the gateway ended the association at this moment
            statuses.append(None)
    if association.is_established:
        association.release()
    return statuses


@contextmanager
def parked(association: Any) -> Iterator[None]:
    """Let the reactor of an association pause before a message is sent.

    pynetdicom requests the pause itself, but can send while the reactor ends its turn. On a busy machine, the reactor
    then takes the response, and the sender waits for it in vain.
    """
    checkpoint = association._reactor_checkpoint
    checkpoint.clear()
    wait_until(lambda: checkpoint._cond._waiters or not association.is_alive(), 0.001)
    try:
        yield
    finally:
        checkpoint.set()


class Pacs:
    """A PACS that stores objects and answers requests for storage commitment.

    Attributes:
        objects_by_uid: The first file of each object, by SOP Instance UID.
        stores: SOP Instance UIDs in the order of the C-STORE requests.
        requests: Transaction UIDs of the commitment requests.
        answers: Statuses of the gateway's responses to the reports; None without a response.
        before: Called with each received object. If it returns a failure, the object is not stored.
        commits: How commitment requests are answered: "same", a report in the same association; "anew", a report in a
            new association to `gateway`; "failed", a report that all objects failed; "later", a report when
            `report_now` is called; "never", no report; "stuck", no report, and the association does not respond.
        reporter: Calling AE title of new associations.
        selects_role: True if new associations negotiate the SCP role.
        hangs_up: True if the association is aborted after the response to the next C-STORE.
        gateway: Address of the gateway, HOST:PORT.
    """

    def __init__(self) -> None:
        self.objects_by_uid: dict[str, bytes] = {}
        self.stores: list[str] = []
        self.requests: list[str] = []
        self.answers: list[int | None] = []
        self.before: Callable[[Dataset], int | None] = lambda dataset: None
        self.commits = "same"
        self.reporter, self.selects_role = "PACS", True
        self.hangs_up = False
        self.gateway = ""
        self._port = free_port()  # of each `up`
        self._ae = AE("PACS")
        # Under load, a response to a report can be lost between two threads of pynetdicom. The default is 30 s.
        self._ae.dimse_timeout = 5
        self._ae.supported_contexts = AllStoragePresentationContexts
        self._ae.add_supported_context(Verification)
        self._ae.add_supported_context(StorageCommitmentPushModel)
        self._reports: list[threading.Thread] = []
        self._after_response: dict[Any, Callable[[], object]] = {}

    @property
    def address(self) -> str:
        """HOST:PORT of the listener."""
        return f"127.0.0.1:{self._port}"

    def objects(self) -> list[Dataset]:
        """Return the stored objects."""
        return [dcmread(BytesIO(data)) for data in [*self.objects_by_uid.values()]]

    def up(self, tls: ssl.SSLContext | None = None) -> None:
        """Start to listen, on the same port each time."""
        handlers: list[Any] = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_N_ACTION, self._action),
            (evt.EVT_PDU_SENT, self._sent),
        ]
        listener = self._ae.start_server(("127.0.0.1", self._port), block=False, evt_handlers=handlers, ssl_context=tls)
        assert listener is not None

    def down(self) -> None:
        """Stop listening and abort all associations."""
        self._ae.shutdown()
        for report in self._reports:
            report.join(LIMIT_S)

    def accept_only(self, ae_title: str) -> None:
        """Reject all other callers."""
        self._ae.require_calling_aet = [ae_title]

    def _store(self, event: Any) -> int:
        dataset = event.dataset
        status = self.before(dataset)
        if status is not None and status < 0xB000:
            return status
        self.stores.append(str(dataset.SOPInstanceUID))
        self.objects_by_uid.setdefault(str(dataset.SOPInstanceUID), event.encoded_dataset())
        if self.hangs_up:
            self.hangs_up = False
            self._after_response[event.assoc] = lambda: event.assoc.abort(block=False)
        return status or 0

    def _action(self, event: Any) -> tuple[int, None]:
        request = event.action_information
        self.requests.append(request.TransactionUID)
        self._last_request = request
        if self.commits == "stuck":
            event.assoc._reactor_checkpoint.clear()
        elif self.commits not in ("never", "later"):
            report = self._report_anew if self.commits == "anew" else self._send_report
            arguments = (event.assoc, self._report(request))
            self._after_response[event.assoc] = lambda: self._start(threading.Thread(target=report, args=arguments))
        return 0, None

    def _start(self, report: threading.Thread) -> None:
        """Start a report. `down` waits only for started ones: a killed gateway receives no response."""
        report.start()
        self._reports.append(report)

    def _sent(self, event: Any) -> None:
        """Continue after a response is sent."""
        if isinstance(event.pdu, P_DATA_TF) and (callback := self._after_response.pop(event.assoc, None)):
            callback()

    def _report(self, request: Dataset) -> Dataset:
        report = Dataset()
        report.TransactionUID = request.TransactionUID
        committed, failed = [], []
        for item in request.ReferencedSOPSequence:
            if item.ReferencedSOPInstanceUID in self.objects_by_uid and self.commits != "failed":
                committed.append(item)
            else:
                item.FailureReason = 0x0112
                failed.append(item)
        if committed:
            report.ReferencedSOPSequence = committed
        if failed:
            report.FailedSOPSequence = failed
        return report

    def report_now(self, transaction: str | None = None) -> None:
        """Report on a transaction, by default on the last one, in a new association."""
        report = self._report(self._last_request)
        report.TransactionUID = transaction or report.TransactionUID
        self._report_anew(None, report)

    def _report_anew(self, _: Any, report: Dataset) -> None:
        wait_until(lambda: self.gateway)  # a gateway that is being opened has no address yet
        host, port = self.gateway.split(":")
        ae = AE(self.reporter)
        ae.add_requested_context(StorageCommitmentPushModel)
        role = build_role(StorageCommitmentPushModel, scp_role=True)
        association = ae.associate(host, int(port), ae_title="CAMSERVE", ext_neg=[role] * self.selects_role)
        if association.is_established:
            self._send_report(association, report)
            association.release()

    def _send_report(self, association: Any, report: Dataset) -> None:
        with contextlib.suppress(RuntimeError), parked(association):  # the gateway may have been killed
            response, _ = association.send_n_event_report(
                report,
                2 if "FailedSOPSequence" in report else 1,
                StorageCommitmentPushModel,
                StorageCommitmentPushModelInstance,
            )
            self.answers.append(response.get("Status"))


@contextmanager
def listening() -> Iterator[Pacs]:
    """Run a PACS."""
    pacs = Pacs()
    pacs.up()
    try:
        yield pacs
    finally:
        pacs.down()


def wait_until(condition: Callable[[], object], interval_s: float = 0.02) -> None:
    """Wait until a condition is true.

    Args:
        condition: Called until it returns a true value.
        interval_s: Seconds between two calls.

    Raises:
        AssertionError: If the condition stays false for LIMIT_S.
    """
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(interval_s)
