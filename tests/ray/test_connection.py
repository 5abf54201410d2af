"""Connections to clusters that do not exist."""

from __future__ import annotations

import socket

import pytest

from camserve_ray.connection import connect
from camserve_server.errors import ConfigError


def test_an_address_without_a_cluster_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        address = f"127.0.0.1:{bound.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"there is no Ray cluster at {address}; .*ray start --head"):
        connect(address)


def test_an_address_without_a_port_is_an_error() -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT of a running one"):
        connect("localhost")
