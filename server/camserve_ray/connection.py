"""The connection of this process to a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
import sys

from camserve_server.errors import ConfigError

__all__ = ["connect"]

_CONNECT_S = 10.0


def connect(address: str | None = None) -> None:
    """Connect this process to a Ray cluster, or start one for it on this machine.

    Ray sends no usage statistics for a cluster that this function starts.

    Args:
        address: HOST:PORT of the cluster, or "auto" for the one that runs on this machine. None starts a cluster that
            listens on the loopback address only and ends with this process.

    Raises:
        ConfigError: There is no cluster at the address.
    """
    if address is None and "ray" not in sys.modules:
        # Ray reads these variables when it is imported. Without the first, it listens on all interfaces.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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
