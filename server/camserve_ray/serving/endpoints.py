"""The endpoints of replicas, of which Serve informs the routers of a process."""

from __future__ import annotations

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


# The endpoints that each router knows. Routers may run in a thread of their own, so tuples replace each other.
_known: WeakKeyDictionary[object, tuple[Endpoint, ...]] = WeakKeyDictionary()


def learn(router: object, endpoints: Iterable[Endpoint]) -> None:
    """Replace the endpoints that a router knows."""
    _known[router] = tuple(endpoints)


def known() -> set[Endpoint]:
    """Return the endpoints of all running replicas."""
    return {endpoint for endpoints in list(_known.values()) for endpoint in endpoints}
