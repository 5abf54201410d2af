"""The connection of this process to a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
import sys

from camserve_server.errors import ConfigError

__all__ = ["connect", "host_of_node", "prepare"]

_CONNECT_S = 10.0


def prepare(address: str | None) -> None:
    """Set the environment variables of a cluster that `connect` starts.

    It listens on the loopback address only, and sends no usage statistics. Ray reads variables when it is imported, so
    call this function before.

    Args:
        address: The argument of `connect`.
    """
    if address is None and "ray" not in sys.modules:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # or Ray replaces 127.0.0.1 by another address
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def connect(address: str | None = None) -> None:
    """Connect this process to a Ray cluster, or start one for it on this machine.

    Args:
        address: HOST:PORT of the cluster, or "auto" for the one that runs on this machine. None starts a cluster that
            ends with this process. It listens on the loopback address only, unless Ray has been imported before.

    Raises:
        ConfigError: There is no cluster at the address.
    """
    prepare(address)
    import ray

    missing = ConfigError(
        f"there is no Ray cluster at {address}; expected HOST:PORT of a running one; start one with "
        "`ray start --head`, or omit the address to start a cluster on this machine"
    )
    if address is not None and address != "auto":
        host, _, port = address.rpartition("/")[2].rpartition(":")
        try:  # Ray itself repeats its attempts for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        except (OSError, ValueError) as error:
            raise missing from error
    try:
        ray.init(
            address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except ConnectionError as error:
        raise missing from error


def host_of_node(address: str) -> str:
    """Return the address of a node as the host of HOST:PORT. It is an IP address, or the name that `ray start` got."""
    return f"[{address}]" if ":" in address else address
