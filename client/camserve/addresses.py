"""Network addresses: split them the way gRPC does, and tell whether they stay on this machine.

This module is the only loopback check of the project. The client, the server and the DICOM gateway use it to decide
where plaintext is acceptable. It imports only the standard library.
"""

from __future__ import annotations

import ipaddress
import re

__all__ = [
    "check_target",
    "is_loopback",
    "is_loopback_host",
    "proxy_options",
    "require_host_port",
    "require_listener",
    "socket_path",
    "split_host_port",
    "target_hosts",
]

# gRPC targets of sockets on this machine, which have no host.
_LOCAL = ("unix:", "unix-abstract:")
# The kernel's limit for the path of a socket, without the final zero.
_MAX_SOCKET_PATH = 107


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
    if address.startswith(_LOCAL):
        return True
    # A target such as dns://8.8.8.8/localhost is resolved by another machine, so its authority must be empty.
    return all(_is_loopback_target(target) for target in _targets(address))


def is_loopback_host(address: str) -> bool:
    """Return True if data sent to this host cannot leave this machine.

    Unlike `is_loopback`, it does not read a prefix as the form of a gRPC target: "unix:80" is port 80 of the host unix.

    Args:
        address: "HOST:PORT" or "HOST", such as the address of an HTTP server or the header Host of a request.
    """
    return _is_loopback_target(address)


def check_target(address: str) -> None:
    """Check that an IPv6 host of a gRPC target has brackets.

    Args:
        address: As for `is_loopback`.

    Raises:
        ValueError: An IPv6 host has no brackets. gRPC would take the port for a part of the host.
    """
    if not address.startswith(_LOCAL):
        for target in _targets(address):
            if not target.startswith("[") and target.count(":") > 1 and "//" not in target:
                raise ValueError(f"{address!r} has an IPv6 host without brackets; write it as in [::1]:50051")


def target_hosts(address: str) -> list[str]:
    """Return the hosts of a gRPC target, without ports and brackets. The argument is that of `is_loopback`."""
    if address.startswith(_LOCAL):
        return []
    return [split_host_port(re.sub(r"^\w+://[^/]*/", "", target))[0] for target in _targets(address)]


def socket_path(address: str) -> str | None:
    """Return the path of a Unix socket, or None if the address is not one.

    Args:
        address: "unix:///PATH", "unix:/PATH" or "unix:PATH", as in gRPC.
    """
    match = re.fullmatch(r"unix:(?://(?=/))?(.+)", address)
    return None if match is None else match[1]


def require_listener(address: str) -> str:
    """Return the address unchanged if it is "HOST:PORT" or the absolute path of a Unix socket.

    Args:
        address: The address of a gRPC listener, from a configuration.

    Raises:
        ValueError: The address is neither, or the path is longer than the kernel permits.
    """
    if not address.startswith("unix:"):
        return require_host_port(address)
    path = socket_path(address)
    if path is None or not re.match("/(?!/)", path) or len(path.encode()) > _MAX_SOCKET_PATH:
        raise ValueError(
            f"{address!r} is not the address of a socket; expected unix: and an absolute path of at most "
            f"{_MAX_SOCKET_PATH} bytes, as in unix:///run/camserve.sock"
        )
    return address


def proxy_options(address: str) -> list[tuple[str, int]]:
    """Return channel options that bypass HTTP proxies for loopback addresses.

    A proxy would forward the data of a plaintext connection, which may contain a token, to another machine.

    Args:
        address: Address of the server.

    Returns:
        Options for the constructor of a channel.
    """
    return [("grpc.enable_http_proxy", 0)] if is_loopback(address) else []


def _targets(address: str) -> list[str]:
    return re.sub(r"^(dns:(///)?|ipv4:|ipv6:)", "", address).split(",")


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
