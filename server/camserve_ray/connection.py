"""The connection of this process to a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from camserve.addresses import is_loopback, split_host_port
from camserve_server.errors import ConfigError

__all__ = ["connect", "host_of_node", "prepare"]

_CONNECT_S = 10.0


def prepare(address: str | None) -> None:
    """Set the environment variables of a cluster that `connect` starts, or of one that listens on loopback only.

    The cluster that `connect` starts listens on the loopback address only, and sends no usage statistics. Ray reads
    variables when it is imported, so call this function before.

    Args:
        address: The argument of `connect`.
    """
    if "ray" in sys.modules:
        return
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None or _on_loopback_only(address):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # or Ray replaces 127.0.0.1 by another address


def _on_loopback_only(address: str) -> bool:
    """Return True if a cluster of this machine, such as one that `connect` has started, has no other address."""
    found = _running_here() if address == "auto" else {address.rpartition("/")[2]}
    return bool(found) and all(
        is_loopback(each) and _listens(each) and not _listens(f"{_own_host()}:{split_host_port(each)[1]}")
        for each in found
    )


def _running_here() -> set[str]:
    """Return the addresses of the clusters of this machine's nodes, in the way in which Ray finds them for "auto"."""
    if given := os.environ.get("RAY_ADDRESS"):
        return {given}
    found = set[str]()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # the process has ended
            arguments = path.read_bytes().decode(errors="replace").split("\0")
            if Path(arguments[0]).name == "raylet":
                found.update(each.partition("=")[2] for each in arguments if each.startswith("--gcs-address="))
    return found


def _own_host() -> str:
    """Return the address by which other machines reach this one, or the loopback address. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent, suppress(OSError):
        unsent.connect(("192.0.2.1", 9))  # an address of no machine, by RFC 5737
        return str(unsent.getsockname()[0])
    return "127.0.0.1"


def _listens(address: str) -> bool:
    """Return True if a connection to the address is accepted."""
    host, port = split_host_port(address)
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError):
        return False
    return True


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
    if address not in (None, "auto") and not _listens(str(address).rpartition("/")[2]):
        raise missing  # Ray itself repeats its attempts for minutes
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
