"""The endpoints of replicas, of which Serve informs the routers of a process."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple
from weakref import WeakKeyDictionary


class Endpoint(NamedTuple):
    """The server of a replica, for proxies.

    Attributes:
        address: HOST:PORT.
        secret: Replicas require it of proxies.
        local_callers_only: True if proxies refuse callers on other machines.
    """

    address: str
    secret: str
    local_callers_only: bool


# The endpoints that each router knows. Serve runs routers in a thread of their own.
_lock = threading.Lock()
_known: WeakKeyDictionary[object, tuple[Endpoint, ...]] = WeakKeyDictionary()


def learn(router: object, endpoints: Iterable[Endpoint]) -> None:
    """Replace the endpoints that a router knows."""
    with _lock:
        _known[router] = tuple(endpoints)


def known() -> set[Endpoint]:
    """Return the endpoints of all running replicas."""
    with _lock:
        return {endpoint for endpoints in _known.values() for endpoint in endpoints}
