"""Connections to clusters that do not exist."""

from __future__ import annotations

import pytest

from camserve_ray.connection import connect, host_of_node
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
