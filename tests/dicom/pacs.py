"""A PACS and a modality, in the process of a test: real associations, and storage that a test can look into."""

from __future__ import annotations

import contextlib
import socket
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
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance, Verification

NAME = "Zwetschge^Quirin"


def image(number: int = 0, **attributes: Any) -> Dataset:
    """A CR of 48×40 pixels; each number another object of the same study."""
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
    """The status of each, None where there was no answer; an empty list where there is no association."""
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
        statuses.append(association.send_c_store(each).get("Status"))
    if association.is_established:
        association.release()
    return statuses


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as anywhere:
        anywhere.bind(("127.0.0.1", 0))
        return int(anywhere.getsockname()[1])


class Pacs:
    """Keeps each object once: `kept` are their bytes by UID, `stores` how often each was stored.

    `before` sees each object that comes in, and may answer in its place. `commits` says how commitments are answered:
    "anew" in an association to `gateway`, "same" in that which asked, "never", "later" when it is told to, or "failed";
    "stuck" is never, and the association hangs. In its own it calls itself `reporter`, and may select its role or not.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.kept: dict[str, bytes] = {}
        self.stores: list[str] = []
        self.before: Callable[[Dataset], int | None] = lambda dataset: None
        self.commits = "same"
        self.reporter, self.selects_role = "PACS", True
        self.asked: list[str] = []
        self.hangs_up = False  # after the next object
        self.gateway = ""
        self._ae = AE("PACS")
        self._ae.supported_contexts = AllStoragePresentationContexts
        self._ae.add_supported_context(Verification)
        self._ae.add_supported_context(StorageCommitmentPushModel)
        self._answers: list[threading.Thread] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def objects(self) -> list[Dataset]:
        """What it keeps, read."""
        return [dcmread(BytesIO(data)) for data in [*self.kept.values()]]

    def up(self, tls: ssl.SSLContext | None = None) -> None:
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_N_ACTION, self._action)]
        self._ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers, ssl_context=tls)

    def down(self) -> None:
        self._ae.shutdown()
        for answer in self._answers:
            answer.join(10)

    def only(self, ae_title: str) -> None:
        """Lets nobody else call."""
        self._ae.require_calling_aet = [ae_title]

    def _store(self, event: Any) -> int:
        dataset = event.dataset
        status = self.before(dataset)
        if status is not None and status < 0xB000:
            return status
        self.stores.append(str(dataset.SOPInstanceUID))
        self.kept.setdefault(str(dataset.SOPInstanceUID), event.encoded_dataset())
        if self.hangs_up:
            self.hangs_up = False
            self._answers.append(threading.Timer(0.02, event.assoc.abort))  # type: ignore[arg-type]
            self._answers[-1].start()
        return status or 0

    def _action(self, event: Any) -> tuple[int, None]:
        said = event.action_information
        self.asked.append(said.TransactionUID)
        self._said = said
        if self.commits == "stuck":
            event.assoc._reactor_checkpoint.clear()
        elif self.commits not in ("never", "later"):
            target = self._anew if self.commits == "anew" else self._same
            thread = threading.Thread(target=target, args=(event.assoc, self._report(said)))
            self._answers.append(thread)
            thread.start()
        return 0, None

    def _report(self, said: Dataset) -> Dataset:
        report = Dataset()
        report.TransactionUID = said.TransactionUID
        there, failed = [], []
        for item in said.ReferencedSOPSequence:
            if item.ReferencedSOPInstanceUID in self.kept and self.commits != "failed":
                there.append(item)
            else:
                item.FailureReason = 0x0112
                failed.append(item)
        if there:
            report.ReferencedSOPSequence = there
        if failed:
            report.FailedSOPSequence = failed
        return report

    def answer_now(self, transaction: str | None = None) -> None:
        """To that, or the last that was asked for, in an association of its own."""
        report = self._report(self._said)
        report.TransactionUID = transaction or report.TransactionUID
        self._anew(None, report)

    def _same(self, association: Any, report: Dataset) -> None:
        time.sleep(0.05)  # after the answer to what was asked
        self._tell(association, report)

    def _anew(self, _: Any, report: Dataset) -> None:
        host, port = self.gateway.split(":")
        ae = AE(self.reporter)
        ae.add_requested_context(StorageCommitmentPushModel)
        role = build_role(StorageCommitmentPushModel, scp_role=True)
        association = ae.associate(host, int(port), ae_title="CAMSERVE", ext_neg=[role] * self.selects_role)
        if association.is_established:
            self._tell(association, report)
            association.release()

    @staticmethod
    def _tell(association: Any, report: Dataset) -> None:
        with contextlib.suppress(RuntimeError):  # who asked may have been killed
            association.send_n_event_report(
                report,
                2 if "FailedSOPSequence" in report else 1,
                StorageCommitmentPushModel,
                StorageCommitmentPushModelInstance,
            )


@contextmanager
def listening() -> Iterator[Pacs]:
    """A PACS that is up."""
    pacs = Pacs()
    pacs.up()
    try:
        yield pacs
    finally:
        pacs.down()


def until(true: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Waits for it. Raises AssertionError."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
