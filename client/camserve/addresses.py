"""Network addresses: split them the way gRPC does, and tell whether they stay on this machine.

This module is the only loopback check of the project. The client, the server and the DICOM gateway use it to decide
where plaintext is acceptable. It imports only the standard library.
"""

from __future__ import annotations

import ipaddress
import re

__all__ = ["is_loopback", "require_host_port", "split_host_port"]


def split_host_port(address: str) -> tuple[str, str]:
    """Split "HOST:PORT" the way gRPC does.

    An IPv6 host needs brackets if a port follows. Without brackets, all of an address with two or more colons is the
    host: gRPC reads "::1:5005" as the host ::1:5005 without a port, not as port 5005 of ::1.

    Args:
        address: A host name, an IPv4 address or a bracketed IPv6 address, optionally followed by ":PORT".

    Returns:
        The host without brackets and the port as written. The port is empty if there is none. Both are empty if the
        brackets are malformed.
    """
    if address.startswith("["):
        bracketed = re.fullmatch(r"\[([^\[\]]+)\](?::(.*))?", address)
        # Brackets hold IPv6 addresses only; gRPC rejects "[localhost]".
        return (bracketed[1], bracketed[2] or "") if bracketed and ":" in bracketed[1] else ("", "")
    if address.count(":") == 1:
        host, _, port = address.partition(":")
        return host, port
    return address, ""


def require_host_port(address: str) -> str:
    """Return the address unchanged if it is "HOST:PORT".

    Args:
        address: The address of a listener or of a peer, from a configuration.

    Raises:
        ValueError: The host is missing, the port is not a number from 0 to 65535, or an IPv6 host has no brackets.
    """
    host, port = split_host_port(address)
    if not (host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ValueError(f"{address!r} is not HOST:PORT; write an IPv6 host in brackets, as in [::1]:50051")
    return address


def is_loopback(address: str) -> bool:
    """Return True if data sent to this address cannot leave this machine.

    The check is strict: a name other than "localhost" is not loopback, whatever it resolves to.

    Args:
        address: "HOST:PORT", "HOST", or another form of gRPC target: unix:, unix-abstract:, dns:, ipv4: or ipv6:,
            the last three with several addresses separated by commas.
    """
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    # A target such as dns://8.8.8.8/localhost is resolved by another machine, so its authority must be empty.
    targets = re.sub(r"^(dns:(///)?|ipv4:|ipv6:)", "", address).split(",")
    return all(_is_loopback_target(target) for target in targets)


def _is_loopback_target(target: str) -> bool:
    host, port = split_host_port(target)
    if port and not port.isalnum():
        return False
    if host.lower() == "localhost":
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
