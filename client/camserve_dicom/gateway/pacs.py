"""Requests to the PACS: C-STORE or STOW-RS to store results, and storage commitment."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import structlog
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE, DEFAULT_TRANSFER_SYNTAXES, build_context, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)

from camserve.addresses import split_host_port
from camserve_dicom.gateway.config import Config, PacsConfig
from camserve_dicom.gateway.http_requests import HttpDestination, Response
from camserve_dicom.gateway.workers import PermanentFailure, TemporaryFailure

__all__ = ["DimsePacs", "Pacs", "StowPacs", "check_storage_status", "sop_reference"]

log = structlog.get_logger()

# A PACS that is sending a commitment report answers the release of the association late.
RELEASE_TIMEOUT_S = 5.0
REJECTED_PERMANENT = 1  # result field of A-ASSOCIATE-RJ (PS3.8 9.3.4)
RESOURCE_LIMITATION = 0x0213  # PS3.7 C.5
# The PACS has the object already. Its UID is derived from its content, so it is the same object.
DUPLICATE_SOP_INSTANCE = 0x0111  # PS3.7 C.5


class Pacs(Protocol):
    """A destination of results."""

    def store(self, files: Sequence[Path], on_stored: Callable[[Path, int], None]) -> None:
        """Store files.

        Args:
            files: DICOM files.
            on_stored: Called with each stored file and its status.

        Raises:
            TemporaryFailure: If a file was not stored and may be stored later.
            PermanentFailure: If the PACS refuses a file.
        """


class DimsePacs:
    """A PACS that takes results by C-STORE.

    Args:
        config: The configuration, whose `pacs` has an address and an AE title.
        on_commitment_report: Handler of N-EVENT-REPORT requests in associations of this class. It returns a status and
            no event reply.
    """

    def __init__(self, config: Config, on_commitment_report: Callable[[evt.Event], tuple[int, None]]) -> None:
        assert config.pacs.address is not None and config.pacs.ae_title is not None
        host, port = split_host_port(config.pacs.address)
        self._host, self._port, self._ae_title = host, int(port), config.pacs.ae_title
        self._tls = (config.tls.client_context(), self._host) if config.tls and config.pacs.tls else None
        self._on_commitment_report = on_commitment_report
        self._ae, self._timeout_s = AE(config.ae_title), config.pacs.timeout_s
        self._ae.connection_timeout = self._ae.acse_timeout = self._timeout_s
        self._ae.dimse_timeout = self._ae.network_timeout = self._timeout_s

    def store(self, files: Sequence[Path], on_stored: Callable[[Path, int], None]) -> None:
        """Store files by C-STORE in one association, see `Pacs.store`."""
        objects = [(file, dcmread(file)) for file in files]
        contexts = {(each.SOPClassUID, each.file_meta.TransferSyntaxUID) for _, each in objects}
        association = self._associate([*contexts])
        try:
            for file, each in objects:
                try:
                    response = association.send_c_store(each)
                except ValueError as error:
                    raise PermanentFailure("the PACS does not accept objects of this class", str(error)) from error
                except RuntimeError as error:
                    raise TemporaryFailure("the PACS ended the association") from error
                if "Status" not in response:
                    raise TemporaryFailure("the PACS did not respond")
                check_storage_status(response.Status)
                on_stored(file, response.Status)
        finally:
            _release(association)

    def request_commitment(self, files: Sequence[Path], transaction: str, wait: Callable[[], None]) -> None:
        """Request storage commitment by N-ACTION (PS3.4 J).

        Args:
            files: DICOM files that are stored.
            transaction: Transaction UID.
            wait: Called while the association is open, so that the PACS can report in it.

        Raises:
            TemporaryFailure: If the request may succeed later.
            PermanentFailure: If the PACS refuses the request.
        """
        request = Dataset()
        request.TransactionUID = transaction
        request.ReferencedSOPSequence = [sop_reference(file) for file in files]
        association = self._associate([(StorageCommitmentPushModel, None)])
        try:
            try:
                response, _ = association.send_n_action(
                    request, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
                )
            except ValueError as error:
                raise PermanentFailure("the PACS does not support storage commitment", str(error)) from error
            except RuntimeError as error:
                raise TemporaryFailure("the PACS ended the association") from error
            if "Status" not in response:
                raise TemporaryFailure("the PACS did not respond")
            if response.Status == RESOURCE_LIMITATION:
                raise TemporaryFailure(f"status {response.Status:#06x}")
            if response.Status != 0:
                raise PermanentFailure(f"storage commitment: status {response.Status:#06x}")
            wait()
        finally:
            association.acse_timeout = min(RELEASE_TIMEOUT_S, self._timeout_s)
            _release(association)

    def _associate(self, contexts: Sequence[tuple[str, str | None]]) -> Association:
        """Return an association with presentation contexts for these SOP classes and transfer syntaxes."""
        proposed = [build_context(sop_class, syntax or DEFAULT_TRANSFER_SYNTAXES) for sop_class, syntax in contexts]
        try:
            association = self._ae.associate(
                self._host,
                self._port,
                contexts=proposed,
                ae_title=self._ae_title,
                tls_args=self._tls,
                evt_handlers=[(evt.EVT_N_EVENT_REPORT, self._on_commitment_report)],
            )
        except (OSError, RuntimeError) as error:
            raise TemporaryFailure("no connection to the PACS") from error
        if association.is_established:
            return association
        response = association.acceptor.primitive
        if association.is_rejected:
            if response is not None and response.result == REJECTED_PERMANENT:
                raise PermanentFailure(
                    f"the PACS rejects the association: source {response.result_source}, reason {response.diagnostic}"
                )
            raise TemporaryFailure("the PACS rejects the association temporarily")
        if response is not None:  # the PACS accepted the association, but no presentation context
            if contexts[0][0] == StorageCommitmentPushModel:
                raise PermanentFailure("the PACS does not support storage commitment; set commitment = false in [pacs]")
            raise PermanentFailure("the PACS does not accept objects of this class")
        raise TemporaryFailure("no connection to the PACS")


def check_storage_status(status: int) -> None:
    """Raise an exception unless a status means that the object is stored (PS3.4 B.2.3).

    Args:
        status: The status of C-STORE, or Failure Reason or Warning Reason of STOW-RS.

    Raises:
        TemporaryFailure: If the PACS is out of resources (0xA7xx).
        PermanentFailure: For any other failure. Warnings (0xBxxx) are not failures.
    """
    if status in (0, DUPLICATE_SOP_INSTANCE) or 0xB000 <= status <= 0xBFFF:
        return
    if 0xA700 <= status <= 0xA7FF:
        raise TemporaryFailure(f"status {status:#06x}")
    raise PermanentFailure(f"status {status:#06x}")


def sop_reference(file: Path) -> Dataset:
    """Return an item of Referenced SOP Sequence for the object in a file."""
    header, item = dcmread(file, specific_tags=["SOPClassUID", "SOPInstanceUID"]), Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    return item


def _release(association: Association) -> None:
    """Release an association, and close its connection if that takes too long.

    Under load, `Association.release` of pynetdicom may never return if the PACS reports a commitment at the same time.
    """
    if not association.is_established:
        return
    thread = threading.Thread(target=association.release, name="release", daemon=True)
    thread.start()
    thread.join((association.acse_timeout or 0.0) + RELEASE_TIMEOUT_S)
    transport = association.dul.socket
    if thread.is_alive() and transport is not None and transport.socket is not None:
        log.warning("association not released")
        with contextlib.suppress(OSError):
            socket.socket.shutdown(transport.socket, socket.SHUT_RDWR)


class StowPacs:
    """A PACS that takes results by DICOMweb STOW-RS (PS3.18 10.5).

    Args:
        pacs: The configuration of the PACS, which has a `stow_url`.
    """

    def __init__(self, pacs: PacsConfig) -> None:
        assert pacs.stow_url is not None
        self._http = HttpDestination(pacs.stow_url, pacs.stow_ca, pacs.stow_authorization_file, pacs.timeout_s)

    def store(self, files: Sequence[Path], on_stored: Callable[[Path, int], None]) -> None:
        """Store files in one request, see `Pacs.store`."""
        response = self._post(files)
        status = response.status
        if response.is_temporary:
            raise TemporaryFailure(f"HTTP {status}")
        if status not in (200, 202, 409):
            raise PermanentFailure(f"HTTP {status}")
        statuses = _parse_statuses(response.body)
        if status != 200 and not statuses:
            raise PermanentFailure(f"HTTP {status}; the archive gave no reason")
        failure: Exception | None = None
        for file in files:
            reason = statuses.get(sop_reference(file).ReferencedSOPInstanceUID, 0)
            try:
                check_storage_status(reason)
            except (TemporaryFailure, PermanentFailure) as error:
                failure = error
            else:
                on_stored(file, reason)
        if failure is not None:
            raise failure

    def _post(self, files: Sequence[Path]) -> Response:
        """Send the files as they are."""
        boundary = secrets.token_hex(16)
        parts = [
            f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode() + file.read_bytes() + b"\r\n"
            for file in files
        ]
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Accept": "application/dicom+json",
        }
        return self._http.post(b"".join([*parts, f"--{boundary}--\r\n".encode()]), headers)


def _parse_statuses(body: bytes) -> dict[str, int]:
    """Return the status of each object with a failure or warning, by SOP Instance UID, from a DICOM JSON response."""
    try:
        parsed = json.loads(body)
        [dataset] = parsed if isinstance(parsed, list) else [parsed]
        statuses = {}
        # Failed SOP Sequence with Failure Reason, and Referenced SOP Sequence with Warning Reason.
        for sequence, reason in (("00081198", "00081197"), ("00081199", "00081196")):
            for item in dataset.get(sequence, {}).get("Value", []):
                if reason in item:
                    statuses[item["00081155"]["Value"][0]] = int(item[reason]["Value"][0])
        return statuses
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
