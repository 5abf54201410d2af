"""A minimal HTTP/2 peer that records frames, to observe the connections of gRPC from outside."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.processes import LIMIT_S

HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0x1, 0x3, 0x4, 0x6, 0x7
ACK = 0x1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(frozen=True)
class Frame:
    """One frame with its time of arrival on the clock of `time.monotonic()`."""

    kind: int
    flags: int
    data: bytes
    at_s: float


@dataclass
class Peer:
    """One end of a connection. It acknowledges settings and, if `answers_pings`, pings; it starts no stream."""

    connection: socket.socket
    answers_pings: bool = True
    frames: list[Frame] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def send(self, kind: int, data: bytes = b"", flags: int = 0) -> None:
        """Send a frame of the connection."""
        header = struct.pack(">I", len(data))[1:] + bytes([kind, flags]) + bytes(4)
        self.connection.sendall(header + data)

    def pings(self) -> list[Frame]:
        """Return the pings of the other end."""
        return [each for each in self.frames if each.kind == PING and not each.flags & ACK]

    def goaway(self) -> bytes:
        """Return the reason with which the other end closed the connection; empty if it did not."""
        return next((each.data[8:] for each in self.frames if each.kind == GOAWAY), b"")

    def record(self) -> None:
        """Record frames until the connection is closed."""
        with contextlib.suppress(OSError), self.connection.makefile("rb") as stream:
            while len(header := stream.read(9)) == 9:
                kind, flags = header[3], header[4]
                data = stream.read(int.from_bytes(header[:3]))
                self.frames.append(Frame(kind, flags, data, time.monotonic()))
                if kind == SETTINGS and not flags & ACK:
                    self.send(SETTINGS, flags=ACK)
                elif kind == PING and not flags & ACK and self.answers_pings:
                    self.send(PING, data, ACK)
        self.closed.set()


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds. The limit is only a safety net."""
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until, "the condition did not become true"
        time.sleep(0.01)


@contextmanager
def _recording(connection: socket.socket, answers_pings: bool) -> Iterator[Peer]:
    peer = Peer(connection, answers_pings)
    thread = threading.Thread(target=peer.record, daemon=True)
    peer.send(SETTINGS)
    thread.start()
    try:
        yield peer
    finally:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT_S)


@contextmanager
def client_of(address: str, *, answers_pings: bool = True) -> Iterator[Peer]:
    """Connect to a server and record what it sends.

    Args:
        address: HOST:PORT of the server.
        answers_pings: Acknowledge the pings of the server.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(PREFACE)
        with _recording(connection, answers_pings) as peer:
            yield peer


@contextmanager
def server_for(connect: Callable[[str], object], *, answers_pings: bool = True) -> Iterator[Peer]:
    """Accept one connection and record what the client sends.

    Args:
        connect: Starts a client of the address that it receives, without waiting for an answer.
        answers_pings: Acknowledge the pings of the client.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT_S)
        connect(f"127.0.0.1:{listener.getsockname()[1]}")
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(None)
            with connection.makefile("rb", 0) as stream:
                assert stream.read(len(PREFACE)) == PREFACE
            with _recording(connection, answers_pings) as peer:
                yield peer
