"""TCP listener for DICOM associations. Connections that request no association do not occupy it.

pynetdicom starts two threads for each connection and waits for the request of an association, also after the peer has
closed the connection. TCP health checks, port scanners and silent peers would therefore exhaust the listener.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from socketserver import BaseServer
from typing import Any

import structlog
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.transport import ThreadedAssociationServer

__all__ = ["Listener"]

log = structlog.get_logger()

# Seconds from the connection to the complete A-ASSOCIATE-RQ, including the TLS handshake.
REQUEST_TIMEOUT_S = 5.0
# Connections that may wait for their A-ASSOCIATE-RQ. Each has a thread. A further one closes the oldest.
MAX_WAITING = 100
A_ASSOCIATE_RQ = b"\x01"  # the PDU type, which is the first byte (PS3.8 9.3.2)
# A-ASSOCIATE-RJ (PS3.8 9.3.4): transient, by the presentation layer, local limit exceeded.
LOCAL_LIMIT_EXCEEDED = (0x02, 0x03, 0x02)


class Listener(ThreadedAssociationServer):
    """A server of associations that limits the number of established ones.

    Args:
        ae: The application entity.
        address: (host, port) to listen on; port 0 selects a free one.
        max_associations: Maximum number of established associations.
        **options: Further arguments of `ThreadedAssociationServer`.

    Attributes:
        max_associations: Maximum number of established associations.
        rejected_associations: Number of associations that were rejected because of this limit.
    """

    daemon_threads = True
    request_queue_size = 128  # of the kernel; a burst of health checks must not delay a modality

    def __init__(self, ae: AE, address: tuple[str, int], max_associations: int, **options: Any) -> None:
        self.max_associations = max_associations
        self._lock = threading.Lock()
        self._deadlines: dict[socket.socket, float] = {}  # connections without A-ASSOCIATE-RQ, oldest first
        self._associations: list[Association] = []
        self.rejected_associations = 0
        super().__init__(ae, address, ae.ae_title, ae.supported_contexts, **options)
        self.bind(evt.EVT_REQUESTED, self._limit_associations)
        self.bind(evt.EVT_CONN_CLOSE, self._end_wait_for_request)

    @property
    def established_associations(self) -> int:
        """The number of established associations."""
        with self._lock:
            return len(self._open_associations())

    @property
    def is_saturated(self) -> bool:
        """True if a further association would be rejected."""
        return self.established_associations >= self.max_associations

    def shutdown(self) -> None:
        """Stop `serve_forever`, and close all connections without an association."""
        BaseServer.shutdown(self)
        self.server_close()

    def server_close(self) -> None:
        """Close the listening socket and all connections without an association."""
        with self._lock:
            waiting = [*self._deadlines]
        for each in waiting:
            _shut_down(each)
        super().server_close()

    def service_actions(self) -> None:
        """Shut down connections without a request in time; `serve_forever` calls this method regularly."""
        super().service_actions()
        now = time.monotonic()
        with self._lock:
            expired = [each for each, deadline in self._deadlines.items() if deadline <= now]
        for each in expired:
            _shut_down(each)  # the thread that waits for its data ends

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Create an association for a connection if it begins with an A-ASSOCIATE-RQ, and close it otherwise."""
        with self._lock:
            oldest = next(iter(self._deadlines)) if len(self._deadlines) >= MAX_WAITING else None
            self._deadlines[request] = time.monotonic() + REQUEST_TIMEOUT_S
        if oldest is not None:
            _shut_down(oldest)
        if self._begins_association(request):
            super().process_request_thread(request, client_address)
        else:
            self._forget(request)
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an unexpected error of a connection; the default would print a traceback."""
        self._forget(request)
        log.error("connection failed")

    def _begins_association(self, connection: socket.socket) -> bool:
        """Wait for the first byte of a connection, and return True if it may be that of an A-ASSOCIATE-RQ."""
        try:
            connection.settimeout(REQUEST_TIMEOUT_S)
            if isinstance(connection, ssl.SSLSocket):  # cannot peek at decrypted data
                connection.do_handshake()
                ready, _, _ = select.select([connection], [], [], 0 if connection.pending() else REQUEST_TIMEOUT_S)
                return bool(ready) or bool(connection.pending())
            return connection.recv(1, socket.MSG_PEEK) == A_ASSOCIATE_RQ
        except (OSError, ValueError):  # the peer or `service_actions` closed the connection
            return False

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._deadlines.pop(connection, None)

    def _open_associations(self) -> list[Association]:
        """Return the established associations. The lock must be held."""
        self._associations = [
            each
            for each in self._associations
            if each.is_alive() and not (each.is_released or each.is_aborted or each.is_rejected)
        ]
        return self._associations

    def _limit_associations(self, event: evt.Event) -> None:
        """Reject a requested association if the limit is reached."""
        association = event.assoc
        transport = association.dul.socket
        if transport is not None and transport.socket is not None:
            self._forget(transport.socket)
        with self._lock:
            if len(self._open_associations()) < self.max_associations:
                self._associations.append(association)
                return
            self.rejected_associations += 1
        request = association.requestor.primitive
        # An unknown peer may send any bytes as its title.
        peer = ascii(request.calling_ae_title.strip()) if request else ""
        log.warning("association rejected", peer=peer, reason="max_associations is reached")
        association.acse.send_reject(*LOCAL_LIMIT_EXCEEDED)
        association.kill()  # waits until the response is sent

    def _end_wait_for_request(self, event: evt.Event) -> None:
        """End the thread of a connection that closed before its A-ASSOCIATE-RQ; pynetdicom would let it wait."""
        association = event.assoc
        transport = association.dul.socket
        if transport is not None and transport.socket is not None:
            self._forget(transport.socket)
        if association.requestor.primitive is None:
            # The thread then ends as if the time for the request had passed.
            association.dul.to_user_queue.put(None)  # type: ignore[arg-type]


def _shut_down(connection: socket.socket) -> None:
    """Shut a connection down; a thread that waits for its data gets an end of file."""
    with contextlib.suppress(OSError):  # it is closed already
        # Not SSLSocket.shutdown, which removes the TLS object that the other thread uses.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
