"""Connections to the gateway that request no association, and the limit of established associations."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from camserve_dicom.gateway import listener
from tests.dicom.conftest import LogLines
from tests.dicom.gateways import UNREACHABLE_SERVER, OpenGateway, Spooled, request
from tests.dicom.pacs import image, send, wait_until
from tests.processes import LIMIT_S

pytestmark = [
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]
LIMITS = {"max_associations": 2, "server": UNREACHABLE_SERVER}


def connected(running: Spooled) -> socket.socket:
    host, _, port = running.address.partition(":")
    return socket.create_connection((host, int(port)), timeout=LIMIT_S)


def associate(running: Spooled) -> Association:
    host, _, port = running.address.partition(":")
    modality = AE("MODALITY")
    modality.add_requested_context(Verification)
    return modality.associate(host, int(port), ae_title="CAMSERVE")


def acceptors() -> int:
    """Return the number of threads that pynetdicom has started for connections."""
    return sum("AcceptorThread" in thread.name for thread in threading.enumerate())


@contextmanager
def repeated(action: Callable[[], object]) -> Iterator[list[int]]:
    """Call a function every few milliseconds in a thread; yield a list of one number, the calls so far."""
    stopped, calls = threading.Event(), [0]

    def run() -> None:
        while not stopped.wait(0.003):
            action()
            calls[0] += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield calls
    finally:
        stopped.set()
        thread.join()


def close_at_once(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def send_bytes(data: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(data)


PEERS: dict[str, Callable[[socket.socket], None]] = {
    "closes": close_at_once,
    "resets": reset,
    "is silent": lambda connection: None,
    "HTTP": send_bytes(b"GET / HTTP/1.1\r\n\r\n"),
    "random bytes": send_bytes(bytes(range(255, 0, -1)) * 9),
    "type of A-ASSOCIATE-RQ": send_bytes(b"\x01"),
    "begin of A-ASSOCIATE-RQ": send_bytes(b"\x01\x00\x00\x00\x01\x00" + bytes(20)),
    "huge A-ASSOCIATE-RQ": send_bytes(b"\x01\x00\xff\xff\xff\xff" + bytes(20)),
    "broken A-ASSOCIATE-RQ": send_bytes(b"\x01\x00\x00\x00\x00\x08" + b"\xff" * 8),
    "other PDU": send_bytes(b"\x04\x00\x00\x00\x00\x04" + bytes(4)),
}


@pytest.mark.parametrize("peer", PEERS)
def test_connections_without_an_association_do_not_block_the_gateway(gateway: OpenGateway, peer: str) -> None:
    with gateway(**LIMITS) as running, ExitStack() as stack:
        for _ in range(12):
            connection = stack.enter_context(connected(running))
            with contextlib.suppress(OSError):  # the gateway may close it first
                PEERS[peer](connection)
        assert send(running.address, image()) == [0]
        assert request(running, "/health")[0] == 200


@pytest.mark.parametrize("peer", PEERS)
def test_gateway_closes_connections_without_an_association(
    gateway: OpenGateway, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "REQUEST_TIMEOUT_S", 0.3)
    with gateway(**LIMITS) as running, ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(connected(running))
            with contextlib.suppress(OSError):
                PEERS[peer](connection)
            if connection.fileno() >= 0:
                with contextlib.suppress(ConnectionResetError):
                    while connection.recv(1000):  # an A-ABORT may come first
                        pass
        wait_until(lambda: acceptors() == 0)


def test_health_checks_during_a_transfer(gateway: OpenGateway) -> None:
    """A TCP health check connects and closes."""
    with gateway(**LIMITS) as running, repeated(lambda: connected(running).close()) as calls:
        wait_until(lambda: calls[0] > 20)
        assert send(running.address, *(image(number) for number in range(10))) == [0] * 10
        wait_until(lambda: calls[0] > 50)
        assert len(running.entries("inbox")) == 10
        assert acceptors() <= 2


def test_silent_connections_give_way_to_newer_ones(gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_WAITING", 5)
    with gateway(**LIMITS) as running, ExitStack() as stack:
        silent = [stack.enter_context(connected(running)) for _ in range(20)]
        assert silent[0].recv(1) == b""
        assert send(running.address, image()) == [0]


def test_slow_request_is_ended(gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that sends its request byte by byte does not get more time."""
    monkeypatch.setattr(listener, "REQUEST_TIMEOUT_S", 0.3)
    with gateway(**LIMITS) as running, connected(running) as connection:
        connection.sendall(b"\x01\x00\x00\x00\x01\x00")
        deadline = time.monotonic() + LIMIT_S
        with pytest.raises(OSError):
            while time.monotonic() < deadline:
                connection.sendall(b"\0")
                time.sleep(0.02)


def test_saturation_is_reported(gateway: OpenGateway, log: LogLines) -> None:
    with gateway(**LIMITS) as running:
        first, second = associate(running), associate(running)
        assert first.is_established
        assert second.is_established
        third = associate(running)
        assert third.is_rejected
        response = third.acceptor.primitive
        assert response is not None
        assert response.result == 2, "transient"
        status, body = request(running, "/health")
        assert (status, json.loads(body)["wrong"]) == (503, ["max_associations associations are open"])
        metrics = request(running, "/metrics")[1]
        assert "camserve_gateway_associations 2.0" in metrics
        assert "camserve_gateway_max_associations 2.0" in metrics
        assert "camserve_gateway_rejected_associations_total 1.0" in metrics
        assert [line["peer"] for line in log if line["event"] == "association rejected"] == ["'MODALITY'"]
        first.release()
        # The gateway counts the association until a moment after its response to the release.
        wait_until(lambda: "camserve_gateway_associations 1.0" in request(running, "/metrics")[1])
        assert send(running.address, image()) == [0]
        second.abort()
        wait_until(lambda: request(running, "/health")[0] == 200)
        wait_until(lambda: "camserve_gateway_associations 0.0" in request(running, "/metrics")[1])
