"""The connections of a proxy to the servers of replicas."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc

from camserve_ray.serving.endpoints import Endpoint, known
from camserve_ray.serving.services import SECRET

_PASSED_ON = ("authorization", "traceparent", "tracestate")
# Seconds between looks for a replica while there is none.
_POLL_S = 0.1
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # the server in the replica has a limit of its own
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 64 << 10),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A node that loses its power closes no connection.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),  # for the acknowledgement of sent data
    ("grpc.http2.ping_timeout_ms", 20_000),  # for the response to a ping; the default is a minute
    ("grpc.http2.max_pings_without_data", 0),
)


class Connection:
    """A connection to one replica.

    Args:
        endpoint: The server of the replica.

    Attributes:
        endpoint: The server of the replica.
        running: The calls of this proxy that run there.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.running = 0
        self._channel = grpc.aio.insecure_channel(endpoint.address, options=_OPTIONS)
        self._methods: dict[str, Any] = {}

    def usable(self) -> bool:
        """Return False if the last attempt to connect has failed."""
        return self._channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.TRANSIENT_FAILURE

    def call(self, path: str, *, streaming: bool, request: bytes, given: Any, timeout: float | None) -> Any:
        """Send a request.

        Args:
            path: The path of the RPC.
            streaming: True if there are several responses.
            request: The encoded request.
            given: The metadata of the caller, of which the replica gets some.
            timeout: The seconds until the deadline.

        Returns:
            The call, of grpc.aio.
        """
        method = self._methods.get(path)
        if method is None:
            method = self._channel.unary_stream(path) if streaming else self._channel.unary_unary(path)
            self._methods[path] = method
        metadata = ((SECRET, self.endpoint.secret), *((key, value) for key, value in given if key in _PASSED_ON))
        return method(request, timeout=timeout, metadata=metadata)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()


class Connections:
    """The connections to all replicas."""

    def __init__(self) -> None:
        self._all: dict[Endpoint, Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def pick(self) -> Connection:
        """Return the connection with fewer calls of two random ones. Waits until there is a replica."""
        while not (connections := self._update()):
            await asyncio.sleep(_POLL_S)
        candidates = [each for each in connections if each.usable()] or connections
        return min(random.sample(candidates, min(2, len(candidates))), key=lambda each: each.running)

    def _update(self) -> list[Connection]:
        """Return the connections to the replicas that Serve names, and close those to others without calls."""
        named = known()
        if named != self._all.keys():
            for endpoint in named - self._all.keys():
                self._all[endpoint] = Connection(endpoint)
            for endpoint in [each for each, connection in self._all.items() if each not in named]:
                if not self._all[endpoint].running:
                    closing = asyncio.create_task(self._all.pop(endpoint).close())
                    self._closing.add(closing)
                    closing.add_done_callback(self._closing.discard)
        return [self._all[endpoint] for endpoint in named]
