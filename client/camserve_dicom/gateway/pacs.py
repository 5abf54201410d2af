"""Calls to the PACS: store, by C-STORE or STOW-RS, and ask for storage commitment."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

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
from camserve_dicom.gateway.workers import Dead, Later

__all__ = ["Dimse", "Pacs", "Stow", "is_stored", "references"]

# Who is just sending an answer to a storage commitment does not look at the release.
RELEASE_WAIT_S = 5.0
REJECTED_FOR_GOOD = 1
NOT_NOW = 0x0213  # resource limitation
THERE_ALREADY = 0x0111  # duplicate SOP instance: ours, for nobody else can have its UID


class Pacs(Protocol):
    """Somewhere to store results."""

    def store(self, files: Sequence[Path], stored: Callable[[Path, int], None]) -> None:
        """Stores the files, calling `stored` with the status of each that is there. Raises Later or Dead."""


class Dimse:
    """A PACS by DIMSE. `answered` is called with what it says of storage commitments, as a handler of the event."""

    def __init__(self, config: Config, answered: Callable[[evt.Event], int]) -> None:
        assert config.pacs.address is not None and config.pacs.ae_title is not None
        host, port = split_host_port(config.pacs.address)
        self._host, self._port, self._ae_title = host, int(port), config.pacs.ae_title
        self._tls = (config.tls.calling(), self._host) if config.tls and config.pacs.tls else None
        self._answered = answered
        self._ae, self._timeout_s = AE(config.ae_title), config.pacs.timeout_s
        self._ae.connection_timeout = self._ae.acse_timeout = self._timeout_s
        self._ae.dimse_timeout = self._ae.network_timeout = self._timeout_s

    def store(self, files: Sequence[Path], stored: Callable[[Path, int], None]) -> None:
        """As Pacs says."""
        objects = [(file, dcmread(file)) for file in files]
        contexts = {(each.SOPClassUID, each.file_meta.TransferSyntaxUID) for _, each in objects}
        association = self._associate([*contexts])
        try:
            for file, each in objects:
                try:
                    answer = association.send_c_store(each)
                except ValueError as error:
                    raise Dead("the PACS takes no such object", str(error)) from error
                except RuntimeError as error:
                    raise Later("the PACS has ended the association") from error
                if "Status" not in answer:
                    raise Later("no answer of the PACS")
                is_stored(answer.Status)
                stored(file, answer.Status)
        finally:
            _end(association)

    def commit(self, files: Sequence[Path], transaction: str, wait: Callable[[], None]) -> None:
        """Asks it to commit itself to the files, and waits for an answer in the same association as long as `wait`."""
        asked = Dataset()
        asked.TransactionUID = transaction
        asked.ReferencedSOPSequence = [references(file) for file in files]
        association = self._associate([(StorageCommitmentPushModel, None)])
        try:
            try:
                answer, _ = association.send_n_action(
                    asked, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
                )
            except ValueError as error:
                raise Dead("the PACS knows no storage commitment", str(error)) from error
            except RuntimeError as error:
                raise Later("the PACS has ended the association") from error
            if "Status" not in answer:
                raise Later("no answer of the PACS")
            if answer.Status == NOT_NOW:
                raise Later(f"status {answer.Status:#06x}")
            if answer.Status != 0:
                raise Dead(f"storage commitment: status {answer.Status:#06x}")
            wait()
        finally:
            association.acse_timeout = min(RELEASE_WAIT_S, self._timeout_s)
            _end(association)

    def _associate(self, contexts: Sequence[tuple[str, str | None]]) -> Association:
        asked = [build_context(sop_class, syntax or DEFAULT_TRANSFER_SYNTAXES) for sop_class, syntax in contexts]
        try:
            association = self._ae.associate(
                self._host,
                self._port,
                contexts=asked,
                ae_title=self._ae_title,
                tls_args=self._tls,
                evt_handlers=[(evt.EVT_N_EVENT_REPORT, self._answered)],
            )
        except (OSError, RuntimeError) as error:
            raise Later("no connection to the PACS") from error
        if association.is_established:
            return association
        if association.is_rejected:
            said = association.acceptor.primitive
            if said is not None and said.result == REJECTED_FOR_GOOD:
                raise Dead(f"the PACS rejects the association: source {said.result_source}, reason {said.diagnostic}")
            raise Later("the PACS rejects the association for now")
        if association.acceptor.primitive is not None:  # it answered, and accepts none of what was proposed
            if contexts[0][0] == StorageCommitmentPushModel:
                raise Dead("the PACS knows no storage commitment: set commitment = false")
            raise Dead("the PACS takes no such object")
        raise Later("no connection to the PACS")


def is_stored(status: int) -> None:
    """Whether C-STORE's status, or the failure reason of STOW-RS, says so. Raises Later or Dead if not."""
    if status in (0, THERE_ALREADY) or 0xB000 <= status <= 0xBFFF:
        return
    if 0xA700 <= status <= 0xA7FF:
        raise Later(f"status {status:#06x}")
    raise Dead(f"status {status:#06x}")


def references(file: Path) -> Dataset:
    """The UIDs of an object in a file."""
    found, item = dcmread(file, specific_tags=["SOPClassUID", "SOPInstanceUID"]), Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = found.SOPClassUID, found.SOPInstanceUID
    return item


def _end(association: Association) -> None:
    if association.is_established:
        association.release()


class Stow:
    """A PACS by DICOMweb's STOW-RS."""

    def __init__(self, pacs: PacsConfig) -> None:
        assert pacs.stow_url is not None
        self._url = urlsplit(pacs.stow_url)
        self._timeout_s = pacs.timeout_s
        self._context = ssl.create_default_context(cafile=pacs.stow_ca) if self._url.scheme == "https" else None
        self._authorization = pacs.stow_authorization_file

    def store(self, files: Sequence[Path], stored: Callable[[Path, int], None]) -> None:
        """As Pacs says."""
        status, answer = self._post(files)
        if status in (401, 403, 408, 429) or status >= 500:  # an operator can renew what has expired
            raise Later(f"HTTP {status}")
        if status not in (200, 202, 409):
            raise Dead(f"HTTP {status}")
        said = _failures(answer)
        if status != 200 and not said:
            raise Dead(f"HTTP {status}, and not why")
        failed: Exception | None = None
        for file in files:
            reason = said.get(references(file).ReferencedSOPInstanceUID, 0)
            try:
                is_stored(reason)
            except (Later, Dead) as error:
                failed = error
            else:
                stored(file, reason)
        if failed is not None:
            raise failed

    def _post(self, files: Sequence[Path]) -> tuple[int, bytes]:
        boundary = secrets.token_hex(16)
        parts = [
            f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode() + file.read_bytes() + b"\r\n"
            for file in files
        ]
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Accept": "application/dicom+json",
        }
        if self._authorization is not None:
            headers["Authorization"] = self._authorization.read_text().strip()
        host, port = self._url.hostname or "", self._url.port
        connection = (
            http.client.HTTPConnection(host, port, timeout=self._timeout_s)
            if self._context is None
            else http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._context)
        )
        try:
            connection.request(
                "POST", self._url.path or "/", b"".join([*parts, f"--{boundary}--\r\n".encode()]), headers
            )
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, socket.gaierror, http.client.HTTPException) as error:
            raise Later("no connection to the PACS") from error
        finally:
            connection.close()


def _failures(answer: bytes) -> dict[str, int]:
    """The status of each object that was not simply stored, by its UID, out of the answer in DICOM JSON."""
    try:
        said = json.loads(answer)
        [found] = said if isinstance(said, list) else [said]
        statuses = {}
        # FailedSOPSequence with FailureReason; ReferencedSOPSequence with WarningReason.
        for sequence, reason in (("00081198", "00081197"), ("00081199", "00081196")):
            for item in found.get(sequence, {}).get("Value", []):
                if reason in item:
                    statuses[item["00081155"]["Value"][0]] = int(item[reason]["Value"][0])
        return statuses
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
