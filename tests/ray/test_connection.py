"""Connections to clusters that do not exist."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from camserve_ray import connection
from camserve_ray.connection import connect, host_of_node, prepare
from camserve_server.errors import ConfigError
from tests.processes import free_port


def test_an_address_without_a_cluster_is_an_error_at_once() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"there is no Ray cluster at {address}; .*ray start --head"):
        connect(address)


def test_an_address_without_a_port_is_an_error() -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT of a running one"):
        connect("localhost")


@pytest.mark.parametrize(
    ("address", "host"), [("10.0.0.1", "10.0.0.1"), ("2001:db8::7", "[2001:db8::7]"), ("node-7", "node-7")]
)
def test_address_of_a_node_is_a_host(address: str, host: str) -> None:
    assert host_of_node(address) == host


@pytest.mark.parametrize(("host", "alone"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_cluster_on_loopback_only_is_found_there(host: str, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray replaces a loopback address by the one that other machines use, where such a cluster does not listen."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    monkeypatch.setattr(connection, "_own_host", lambda: "127.0.0.2")
    with socket.create_server((host, 0)) as cluster:
        address = f"127.0.0.1:{cluster.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        for given in (address, "auto"):
            monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
            prepare(given)
            assert os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == ("0" if alone else None)


def test_nodes_of_this_machine_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    address = f"127.0.0.1:{free_port()}"
    code = "print(flush=True); input()"
    arguments = ["/somewhere/raylet", "-c", code, f"--gcs-address={address}"]
    with subprocess.Popen(
        arguments, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as node:
        assert node.stdout is not None
        node.stdout.readline()
        assert address in connection._running_here()
        node.communicate("\n")
    assert address not in connection._running_here()
