"""The port that the front ends of one server share, and no other server."""

from __future__ import annotations

import errno
import socket
import time

from camserve.addresses import split_host_port
from camserve_server.service.listeners import cannot_bind

# Addresses of a name that this machine does not have, such as ::1 of localhost on a machine without IPv6.
_NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
# Front ends of a server that was killed hold the port until they notice it, some milliseconds later.
WAIT_S, TRIES = 0.05, 20


class SharedPort:
    """Holds a port for the front ends of this server until `close`.

    The port is first bound exclusively, so that binding fails if any other server uses it. Only then SO_REUSEPORT is
    set. From then on, other sockets of the same user that also set it can bind the port: those of the front ends. A
    second server cannot, because it binds the port exclusively, too. The sockets never listen, so that they receive no
    connections. A port in use is tried again for a second.

    Args:
        address: HOST:PORT; port 0 selects a free port.

    Attributes:
        address: HOST:PORT with the selected port.

    Raises:
        ConfigError: The address cannot be bound.
    """

    def __init__(self, address: str) -> None:
        self._sockets: list[socket.socket] = []
        host, port = split_host_port(address)
        missing: OSError | None = None
        try:
            found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, place in dict.fromkeys(found):
                try:
                    self._sockets.append(_bind_patiently(family, (place[0], int(port), *place[2:])))
                except OSError as error:
                    if error.errno not in _NOT_HERE:
                        raise
                    missing = error
                else:
                    port = str(self._sockets[0].getsockname()[1])
            if not self._sockets:
                raise missing or OSError("the name has no address")
        except OSError as error:
            self.close()
            raise cannot_bind("listen", address) from error
        self.address = f"{address.rpartition(':')[0]}:{port}"

    def close(self) -> None:
        """Release the port."""
        for each in self._sockets:
            each.close()


def _bind_patiently(family: int, place: tuple[object, ...]) -> socket.socket:
    for _ in range(TRIES - 1):
        try:
            return _bound(family, place)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        time.sleep(WAIT_S)
    return _bound(family, place)


def _bound(family: int, place: tuple[object, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # SO_REUSEADDR permits connections of a previous server that the kernel still remembers (TIME_WAIT). It would
        # also permit a second server to bind the port, as long as this socket does not listen.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        bound.close()
        raise
    return bound
