"""The port that the front ends of a server share."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import SimpleNamespace

import grpc
import pytest

from camserve_server.errors import ConfigError
from camserve_server.service.frontends import port as port_module
from camserve_server.service.frontends.port import TRIES, WAIT_S, SharedPort
from camserve_server.service.listeners import EXCLUSIVE_PORT, SHARED_PORT, bind


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a SharedPort waits, one after the other. It does not sleep."""
    waited: list[float] = []
    monkeypatch.setattr(port_module, "time", SimpleNamespace(sleep=waited.append))
    return waited


def in_loop(work: Callable[[], None]) -> None:
    """Call a function on an event loop, which gRPC servers need."""

    async def run() -> None:
        work()

    asyncio.run(run())


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0"])
def test_front_ends_share_the_port_and_no_other_server_gets_it(address: str) -> None:
    def work() -> None:
        port = SharedPort(address)
        for _ in range(2):
            assert bind(grpc.aio.server(options=[SHARED_PORT]), "listen", port.address) == port.address
        with pytest.raises(ConfigError, match=r"^listen: cannot bind .* the port is free"):
            bind(grpc.aio.server(options=[EXCLUSIVE_PORT]), "listen", port.address)
        with pytest.raises(ConfigError, match=r"^listen: cannot bind .* the port is free"):
            SharedPort(port.address)
        port.close()

    in_loop(work)


def test_port_is_taken_before_any_front_end_listens() -> None:
    port = SharedPort("127.0.0.1:0")
    with pytest.raises(ConfigError):
        SharedPort(port.address)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", int(port.address.rpartition(":")[2])))
    port.close()
    again = SharedPort(port.address)
    assert again.address == port.address
    again.close()


def test_port_of_a_server_that_was_killed_is_awaited(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as front_end:
        address = f"127.0.0.1:{front_end.getsockname()[1]}"

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:
                front_end.close()

        monkeypatch.setattr(port_module, "time", SimpleNamespace(sleep=sleep))
        port = SharedPort(address)
        assert port.address == address
        assert waits == [WAIT_S] * 3
        port.close()


def test_port_of_another_server_is_refused(waits: list[float]) -> None:
    def work() -> None:
        address = bind(grpc.aio.server(options=[EXCLUSIVE_PORT]), "listen", "127.0.0.1:0")
        with pytest.raises(ConfigError):
            SharedPort(address)

    in_loop(work)
    assert waits == [WAIT_S] * (TRIES - 1)


def test_unknown_host_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^listen: cannot bind no-such-host\.invalid"):
        SharedPort("no-such-host.invalid:0")


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^listen: cannot bind 192\.0\.2\.1"):
        SharedPort("192.0.2.1:0")
