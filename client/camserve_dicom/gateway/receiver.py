"""What others call the gateway for: to hand in images, and to say what became of storage commitments."""

from __future__ import annotations

import importlib.util
import json
import logging
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any, cast

from pydicom import Dataset, dcmread
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    ParametricMapStorage,
    RLELossless,
    RTDoseStorage,
    SegmentationStorage,
)
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification  # type: ignore[attr-defined]

from camserve.addresses import split_host_port
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.config import Config, ConfigError
from camserve_dicom.gateway.spool import Spool, Stage

__all__ = ["Receiver"]

log = logging.getLogger(__name__)

TAKEN = 0x0000
NOT_AUTHORISED = 0x0124
NO_ROOM = 0xA700
OTHER_OBJECT = 0xA900
UNREADABLE = 0xC000
INVALID_VALUE = 0x0115

# What can be decoded, the surest first: a PACS that has it otherwise may send it as one of these.
_READ = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
    JPEGLSLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLossless,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEGLSNearLossless,
    JPEG2000,
    HTJ2K,
    JPEGBaseline8Bit,
]
if importlib.util.find_spec("libjpeg"):  # which is GPL, and nobody's who has not installed it
    _READ.append(JPEGExtended12Bit)
# 16 KB are what it says it takes; some send more.
MOST_PDU_BYTES = 1 << 20
INFLATED_BYTES = 1 << 20  # at a time
# They have rows, but show nobody.
_NO_PICTURES = (SegmentationStorage, ParametricMapStorage, RTDoseStorage)
# What the rules ask for, and the loop guard.
_HEADER = [
    "SOPClassUID",
    "SOPInstanceUID",
    "ImageType",
    "PresentationIntentType",
    "Modality",
    "BodyPartExamined",
    "Rows",
    "Manufacturer",
    "ContributingEquipmentSequence",
]


class Receiver:
    """Listens as long as it is open.

    `committed` is called with a transaction's UID, the UIDs that the PACS has, and those that it has not with the
    reason for each; it says whether it knows the transaction.
    """

    def __init__(
        self,
        config: Config,
        spool: Spool,
        audit: Audit,
        committed: Callable[[str, list[str], dict[str, int]], bool],
    ) -> None:
        self._config, self._spool, self._audit = config, spool, audit
        self._committed = committed
        self._ae = AE(config.ae_title)
        self._ae.require_called_aet = True
        # A PACS that may not send still has to say what it has committed itself to.
        self._ae.require_calling_aet = sorted({*config.callers, *config.pacs.committers})
        self._ae.maximum_associations = config.max_associations
        self._ae.network_timeout = self._ae.acse_timeout = self._ae.dimse_timeout = config.idle_s
        self._ae.supported_contexts = AllStoragePresentationContexts
        for context in self._ae.supported_contexts:
            context.transfer_syntax = _READ  # type: ignore[assignment]
        self._ae.add_supported_context(Verification)
        self._ae.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)

    def open(self) -> str:
        """Begins to listen; returns where. Raises ConfigError."""
        host, port = split_host_port(self._config.listen)
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, self._connected),
            (evt.EVT_PDU_RECV, self._bounded),
            (evt.EVT_REJECTED, self._rejected),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_N_EVENT_REPORT, self.answered),
        ]
        try:
            listener = self._ae.start_server(
                (host, int(port)),
                block=False,
                ssl_context=self._config.tls.listening() if self._config.tls else None,
                evt_handlers=handlers,
            )
        except (OSError, OverflowError) as error:
            raise ConfigError(f"listen: cannot bind {self._config.listen}; is another gateway there?") from error
        assert listener is not None and listener.socket is not None
        return f"{self._config.listen.rpartition(':')[0]}:{listener.socket.getsockname()[1]}"

    def close(self) -> None:
        """Listens no more, and aborts what is under way: who sent it has no answer, and sends it again."""
        self._ae.shutdown()

    # ---- handlers, each on the thread of its association ------------------------------------------------------------

    def _connected(self, event: evt.Event) -> None:
        """Lets no one stop within a message for ever, nor announce one that would fill the memory."""
        socket = event.assoc.dul.socket
        if socket is None or socket.socket is None:
            return
        socket.socket.settimeout(self._config.idle_s)
        receive = socket.recv

        def bounded(count: int) -> bytearray:
            if count > MOST_PDU_BYTES:  # pynetdicom would read it whole, whatever it said it takes
                raise OSError("a protocol data unit is too long")
            return receive(count)

        socket.recv = bounded  # type: ignore[assignment, method-assign]

    def _bounded(self, event: evt.Event) -> None:
        """Aborts an object that is too large while it comes in."""
        message = event.assoc.dimse.message
        so_far = getattr(message, "data_set", None)
        if isinstance(so_far, BytesIO) and so_far.tell() > self._config.max_object_bytes:
            event.assoc.abort(block=False)
            so_far.truncate(0)
            self._audit.write("too large", peer=_caller(event))

    def _rejected(self, event: evt.Event) -> None:
        # Who sets a modality up wants to know. A stranger may call himself anything.
        log.warning("association rejected", extra={"said": {"peer": ascii(_caller(event))}})

    def _store(self, event: evt.Event) -> int:
        caller = _caller(event)
        try:
            if caller not in self._config.callers:
                return NOT_AUTHORISED
            part10 = event.encoded_dataset()
            try:
                if event.context.transfer_syntax == DeflatedExplicitVRLittleEndian and self._inflates(event):
                    self._audit.write("too large", peer=caller)
                    return UNREADABLE
                header = dcmread(BytesIO(part10), specific_tags=[*_HEADER])
                uid = str(header.SOPInstanceUID)
            except Exception:  # whatever a broken header makes of the parser
                log.warning("an object cannot be read")
                return UNREADABLE
            if uid != cast(C_STORE, event.request).AffectedSOPInstanceUID:
                return OTHER_OBJECT
            return self._take(header, part10, caller)
        except OSError as error:
            log.error("no object can be taken", extra={"said": {"errno": error.errno}})
            return NO_ROOM

    def _inflates(self, event: evt.Event) -> bool:
        """Whether a deflated object is too large: who reads it has it whole, and a few kilobytes may be gigabytes."""
        inflater, left_bytes = zlib.decompressobj(-zlib.MAX_WBITS), self._config.max_object_bytes
        data = cast(BytesIO, cast(C_STORE, event.request).DataSet).getvalue()
        while data and not inflater.eof and left_bytes >= 0:
            left_bytes -= len(inflater.decompress(data, INFLATED_BYTES))
            data = inflater.unconsumed_tail
        return left_bytes < 0

    def _take(self, header: Dataset, part10: bytes, caller: str) -> int:
        name = self._spool.name(str(header.SOPInstanceUID))
        why_not = self._why_not(header, caller)
        if why_not is None:
            full = self._spool.count(Stage.inbox) >= self._config.max_waiting
            if full or self._spool.free_bytes() < self._config.min_free_bytes + len(part10):
                log.warning("no room", extra={"said": {"queue": full}})
                return NO_ROOM
            self._audit.write("received", object=name, peer=caller, bytes=len(part10))
            entry = json.dumps({"caller": caller}).encode()
            if self._spool.take(name, {"source.dcm": part10, "entry.json": entry}):
                return TAKEN
            why_not = "under way already"
        self._audit.write("dropped", object=name, peer=caller, reason=why_not)
        return TAKEN

    def _why_not(self, header: Dataset, caller: str) -> str | None:
        """Why the object is not explained. The loop guard: what the gateway stores may be sent to it again."""
        equipment = [header, *header.get("ContributingEquipmentSequence", [])]
        if any(each.get("Manufacturer") == "camserve" for each in equipment):
            return "own"
        if "Rows" not in header or header.get("SOPClassUID") in _NO_PICTURES:
            return "no image"
        if header.get("PresentationIntentType") == "FOR PROCESSING":  # the one for presentation comes as well
            return "for processing"
        if [*header.get("ImageType", [])][:2] == ["DERIVED", "SECONDARY"]:
            return "derived"
        if self._config.rule(*described(header), caller) is None:
            return "no rule"
        return None

    def answered(self, event: evt.Event) -> int:
        """The PACS says what became of a storage commitment, in this association or in that which asked for it."""
        peer = event.assoc.requestor if event.assoc.is_acceptor else event.assoc.acceptor
        if peer.ae_title.strip() not in self._config.pacs.committers:
            return NOT_AUTHORISED
        said = event.event_information
        there = [str(item.ReferencedSOPInstanceUID) for item in said.get("ReferencedSOPSequence", [])]
        failed = {
            str(item.ReferencedSOPInstanceUID): int(item.get("FailureReason", 0))
            for item in said.get("FailedSOPSequence", [])
        }
        known = self._committed(str(said.get("TransactionUID", "")), there, failed)
        return TAKEN if known else INVALID_VALUE


def described(header: Dataset) -> tuple[str, str]:
    """Modality and body part, as the rules know them."""
    modality, body_part = (str(header.get(key) or "").strip().upper() for key in ("Modality", "BodyPartExamined"))
    return modality, body_part


def _caller(event: evt.Event) -> str:
    return str(event.assoc.requestor.ae_title).strip()
