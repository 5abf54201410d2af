"""Channel options for pings and for the age of connections, observed by their effect on real connections.

gRPC ignores unknown options, so a wrong name has no other effect than that the default applies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import grpc
import pytest

import camserve
from camserve import connection
from camserve_server.config import Config, ModelConfig
from camserve_server.service import listeners
from camserve_server.service import server as server_module
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.http2 import HEADERS, PING, Peer, client_of, server_for, wait_until

# By default, gRPC closes a connection at the third ping that comes too early, and pings without a call come too early
# for two hours.
MANY = 8
MINUTE_S = 60


def config(**options: Any) -> Config:
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    return Config(
        **{
            "listen": "127.0.0.1:0",
            "health_listen": "127.0.0.1:0",
            "admin_listen": "127.0.0.1:0",
            "models": [tiny],
            **options,
        }
    )


@contextmanager
def shortened(*, age_ms: int = 600_000, ping_ms: int = 60_000, **intervals_ms: int) -> Iterator[Server]:
    """Run a server with shorter intervals than the usual ones, in milliseconds."""
    values = {
        "grpc.http2.min_ping_interval_without_data_ms": 100,
        "grpc.keepalive_time_ms": ping_ms,
        "grpc.keepalive_timeout_ms": 300,
        "grpc.http2.ping_timeout_ms": 300,
    }
    options = tuple((name, values.get(name, value)) for name, value in listeners.KEEPALIVE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listeners, "KEEPALIVE", options)
        patch.setattr(server_module, "KEEPALIVE", options)
        patch.setattr(listeners, "CONNECTION_AGE", ("grpc.max_connection_age_ms", age_ms))
        with serving(config()) as server:
            yield server


def ping(client: Peer, number: int) -> None:
    """Send a ping, and wait until it is acknowledged or the connection ends.

    The server then sees at least the intervals of the client between two pings, also if it is slow.
    """
    client.send(PING, bytes(8))
    wait_until(lambda: sum(each.kind == PING for each in client.frames) >= number or client.closed.is_set())


def test_listeners_allow_the_pings_of_idle_clients() -> None:
    with shortened() as server:
        for address in (server.address, server.health_address, server.admin_address):
            with client_of(address) as client:
                for number in range(1, MANY + 1):
                    time.sleep(0.15)
                    ping(client, number)
                assert not client.goaway()
            with client_of(address) as client:
                # One after the other: unread pings would make the server reset the connection, without its reason.
                with suppress(OSError):  # the server closes the connection before the last ping
                    for number in range(1, 10 * MANY + 1):
                        ping(client, number)
                wait_until(client.goaway)
                assert client.goaway() == b"too_many_pings"


@pytest.mark.slow
def test_health_listener_serves_a_watcher_that_pings() -> None:
    """A client that only uses `health_listen` stays connected, although nothing changes for a long time."""
    options = [("grpc.keepalive_time_ms", 200), ("grpc.http2.max_pings_without_data", 0)]
    request = bytes([0x0A, len(listeners.SERVICE)]) + listeners.SERVICE.encode()
    with shortened() as server, grpc.insecure_channel(server.health_address, options) as channel:
        watch: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")
        call = watch(request)
        assert next(call) == b"\x08\x01"
        time.sleep(6)  # gRPC pings once a second at most
        assert call.is_active()
        call.cancel()


@pytest.mark.slow
def test_front_ends_allow_the_pings_of_idle_clients() -> None:
    """The intervals are the real ones, because front ends are processes of their own."""
    (interval_ms,) = (value for name, value in listeners.KEEPALIVE if "min_ping" in name)
    with serving(config(frontends=2)) as server, ExitStack() as stack:
        addresses = [server.address, server.address, server.health_address, server.admin_address]
        clients = [stack.enter_context(client_of(address)) for address in addresses]
        for number in range(1, 5):
            for client in clients:
                ping(client, number)
            time.sleep(interval_ms / 1000 + 0.2)
        assert [client.goaway() for client in clients] == [b""] * len(clients)


@pytest.mark.slow
def test_server_closes_the_connection_of_a_client_that_does_not_answer_pings() -> None:
    with shortened(ping_ms=200) as server:
        for address in (server.address, server.health_address, server.admin_address):
            start = time.monotonic()
            with client_of(address, answers_pings=False) as client:
                wait_until(client.closed.is_set)
                assert client.pings()
            assert time.monotonic() - start < MINUTE_S / 2, "gRPC waits for a minute by default"


def test_server_closes_old_connections() -> None:
    with shortened(age_ms=300) as server, client_of(server.address) as client:
        wait_until(client.goaway)
        assert client.goaway() == b"max_age"


@pytest.mark.slow
def test_client_pings_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC sends two pings without data by default."""
    monkeypatch.setattr(connection, "KEEPALIVE_MS", 200)
    clients: list[camserve.Client] = []

    def connect(address: str) -> None:
        clients.append(camserve.Client(address, timeout=0.5))
        threading.Thread(target=attempt, args=clients, daemon=True).start()

    def attempt(client: camserve.Client) -> None:
        with pytest.raises(camserve.DeadlineExceeded):
            client.models()

    with server_for(connect) as server:
        wait_until(lambda: len(server.pings()) > 3)
        calls = [each.at_s for each in server.frames if each.kind == HEADERS]
        assert len(calls) <= 2  # the health check and the load reports
        assert not server.closed.is_set()
    clients[0].close()


@pytest.mark.slow
def test_client_closes_a_connection_whose_server_does_not_answer_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "KEEPALIVE_MS", 200)
    monkeypatch.setattr(connection, "KEEPALIVE_TIMEOUT_MS", 300)
    clients: list[camserve.Client] = []

    def connect(address: str) -> None:
        clients.append(camserve.Client(address))
        threading.Thread(target=attempt, args=clients, daemon=True).start()

    def attempt(client: camserve.Client) -> None:
        with pytest.raises(camserve.CamserveError):
            client.models()

    start = time.monotonic()
    with server_for(connect, answers_pings=False) as server:
        wait_until(server.closed.is_set)
        assert server.pings()
    assert time.monotonic() - start < MINUTE_S / 2, "gRPC waits for a minute by default"
    clients[0].close()
