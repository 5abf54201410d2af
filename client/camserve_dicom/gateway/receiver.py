"""DIMSE listener of the gateway, which receives images and reports on storage commitments."""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any, cast

import structlog
from pydicom import dcmread
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
    RLELossless,
)
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification  # type: ignore[attr-defined]

from camserve.addresses import split_host_port
from camserve_dicom.decoding import JPEG_PROGRESSIVE, JPEG_XL
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.config import Config, ConfigError
from camserve_dicom.gateway.intake import HEADER, Intake, SpoolFull
from camserve_dicom.gateway.listener import REQUEST_TIMEOUT_S, Listener

__all__ = ["Receiver"]

log = structlog.get_logger()

# Status codes (PS3.4 B.2.3, PS3.7 C.5).
SUCCESS = 0x0000
INVALID_ARGUMENT_VALUE = 0x0115
NOT_AUTHORISED = 0x0124
OUT_OF_RESOURCES = 0xA700
DATASET_MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000

# Transfer syntaxes that can be decoded, in the order of preference: a sender may convert the pixels to one of them.
_TRANSFER_SYNTAXES = [
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
    JPEGExtended12Bit,
    *JPEG_PROGRESSIVE,
    *JPEG_XL,
]
# The listener announces a maximum PDU length of 16 KiB. Some peers exceed it.
MAX_PDU_BYTES = 1 << 20
INFLATE_CHUNK_BYTES = 1 << 20


class Receiver:
    """A DIMSE listener between `open` and `close`.

    Args:
        config: The configuration of the gateway.
        audit: The audit trail.
        intake: Takes received objects.
        handle_report: Processes a commitment report. It is called with the Transaction UID, the SOP Instance UIDs that
            the PACS is committed to, and failure reasons by SOP Instance UID. It returns False for an unknown
            transaction.

    Attributes:
        listener: The listener between `open` and `close`, otherwise None.
    """

    def __init__(
        self,
        config: Config,
        audit: Audit,
        intake: Intake,
        handle_report: Callable[[str, list[str], dict[str, int]], bool],
    ) -> None:
        self._config, self._audit, self._intake = config, audit, intake
        self._handle_report = handle_report
        self._ae = AE(config.ae_title)
        self._ae.require_called_aet = True
        # The PACS reports commitments even if it may not send images.
        self._ae.require_calling_aet = sorted({*config.callers, *config.pacs.commitment_ae_titles})
        # The listener limits associations. pynetdicom would also count connections that have not requested one.
        self._ae.maximum_associations = sys.maxsize
        self._ae.network_timeout = self._ae.dimse_timeout = config.idle_s
        self._ae.acse_timeout = REQUEST_TIMEOUT_S
        self._ae.supported_contexts = AllStoragePresentationContexts
        for context in self._ae.supported_contexts:
            context.transfer_syntax = _TRANSFER_SYNTAXES  # type: ignore[assignment]
        self._ae.add_supported_context(Verification)
        self._ae.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
        self.listener: Listener | None = None

    def open(self) -> str:
        """Start to listen.

        Returns:
            The address, HOST:PORT with the actual port.

        Raises:
            ConfigError: If the address is not available, or a file of [tls] is invalid.
        """
        host, port = split_host_port(self._config.listen)
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, self._limit_connection),
            (evt.EVT_PDU_RECV, self._abort_if_too_large),
            (evt.EVT_REJECTED, self._log_rejection),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_N_EVENT_REPORT, self.commitment_report),
        ]
        try:
            listener = Listener(
                self._ae,
                (host, int(port)),
                self._config.max_associations,
                ssl_context=self._config.tls.server_context() if self._config.tls else None,
                evt_handlers=handlers,
            )
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"listen: cannot bind {self._config.listen}; choose a free address of this machine, or stop the "
                "process that uses it"
            ) from error
        self.listener = listener
        threading.Thread(target=listener.serve_forever, name="listener", daemon=True).start()
        assert listener.socket is not None
        return f"{self._config.listen.rpartition(':')[0]}:{listener.socket.getsockname()[1]}"

    def close(self) -> None:
        """Stop listening and abort all associations. A sender without a response must send its object again."""
        if self.listener is not None:
            self.listener.shutdown()
        self._ae.shutdown()

    # ---- event handlers, each on the thread of its association ------------------------------------------------------

    def _limit_connection(self, event: evt.Event) -> None:
        """Set a timeout and a maximum PDU length for a new connection."""
        transport = event.assoc.dul.socket
        if transport is None or transport.socket is None:
            return
        transport.socket.settimeout(self._config.idle_s)
        receive = transport.recv

        def receive_limited(count: int) -> bytearray:
            if count > MAX_PDU_BYTES:  # pynetdicom would read the whole PDU into memory
                raise OSError(f"a PDU has more than {MAX_PDU_BYTES} bytes")
            return receive(count)

        transport.recv = receive_limited  # type: ignore[assignment, method-assign]

    def _abort_if_too_large(self, event: evt.Event) -> None:
        """Abort the association while it receives an object that exceeds max_object_bytes."""
        message = event.assoc.dimse.message
        received = getattr(message, "data_set", None)
        if isinstance(received, BytesIO) and received.tell() > self._config.max_object_bytes:
            event.assoc.abort(block=False)
            received.truncate(0)
            self._audit.write("too large", peer=_calling_ae_title(event))

    def _log_rejection(self, event: evt.Event) -> None:
        # An operator who sets up a modality needs the title. An unknown peer may send any bytes as its title.
        log.warning("association rejected", peer=ascii(_calling_ae_title(event)))

    def _store(self, event: evt.Event) -> int:
        """Handle C-STORE: check the object and add it to the spool. Return the status."""
        caller = _calling_ae_title(event)
        try:
            if caller not in self._config.callers:
                return NOT_AUTHORISED
            part10 = event.encoded_dataset()
            try:
                if event.context.transfer_syntax == DeflatedExplicitVRLittleEndian and self._inflates_too_large(event):
                    self._audit.write("too large", peer=caller)
                    return CANNOT_UNDERSTAND
                header = dcmread(BytesIO(part10), specific_tags=[*HEADER])
                uid = str(header.SOPInstanceUID)
            except Exception:  # a corrupt header can raise any exception in the parser
                log.warning("an object cannot be read")
                return CANNOT_UNDERSTAND
            if uid != cast(C_STORE, event.request).AffectedSOPInstanceUID:
                return DATASET_MISMATCH
            self._intake.add(header, part10, caller)
            return SUCCESS
        except (SpoolFull, OSError) as error:
            if isinstance(error, OSError):
                log.error("cannot write the object", errno=error.errno)
            return OUT_OF_RESOURCES

    def _inflates_too_large(self, event: evt.Event) -> bool:
        """Return True if a deflated object exceeds max_object_bytes. A few kilobytes may inflate to gigabytes."""
        inflater, left_bytes = zlib.decompressobj(-zlib.MAX_WBITS), self._config.max_object_bytes
        data = cast(BytesIO, cast(C_STORE, event.request).DataSet).getvalue()
        while data and not inflater.eof and left_bytes >= 0:
            left_bytes -= len(inflater.decompress(data, INFLATE_CHUNK_BYTES))
            data = inflater.unconsumed_tail
        return left_bytes < 0

    def commitment_report(self, event: evt.Event) -> tuple[int, None]:
        """Handle an N-EVENT-REPORT request of the PACS in any association.

        Returns:
            The status of the response, which has no event reply.
        """
        peer = event.assoc.requestor if event.assoc.is_acceptor else event.assoc.acceptor
        if peer.ae_title.strip() not in self._config.pacs.commitment_ae_titles:
            return NOT_AUTHORISED, None
        report = event.event_information
        committed = [str(item.ReferencedSOPInstanceUID) for item in report.get("ReferencedSOPSequence", [])]
        failed = {
            str(item.ReferencedSOPInstanceUID): int(item.get("FailureReason", 0))
            for item in report.get("FailedSOPSequence", [])
        }
        accepted = self._handle_report(str(report.get("TransactionUID", "")), committed, failed)
        return SUCCESS if accepted else INVALID_ARGUMENT_VALUE, None


def _calling_ae_title(event: evt.Event) -> str:
    return str(event.assoc.requestor.ae_title).strip()
