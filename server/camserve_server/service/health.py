"""The service grpc.health.v1.

The implementation of grpcio is not used: when one watcher leaves, its other watchers miss later changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

Context = grpc.aio.ServicerContext[Any, Any]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Implements Health with a state for each service. All methods belong to the event loop."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {}
        self._changed = asyncio.Event()

    def set(self, service: str, state: int) -> None:
        """Set the state of a service and notify its watchers.

        Args:
            service: The full name of the service; empty for the whole server.
            state: A value of HealthCheckResponse.ServingStatus.
        """
        self._states[service] = state
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def services(self) -> list[str]:
        """The full names of all services."""
        return [*self._states]

    def state(self, service: str) -> int:
        """Return the state of a service, a value of HealthCheckResponse.ServingStatus."""
        state: int = self._states.get(service, HealthCheckResponse.SERVICE_UNKNOWN)
        return state

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:
        """Return the state of a service; abort with NOT_FOUND if the service is unknown."""
        if request.service not in self._states:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r}")
        return HealthCheckResponse(status=self._states[request.service])

    async def Watch(self, request: HealthCheckRequest, context: Context) -> AsyncIterator[HealthCheckResponse]:
        """Yield the state of a service now and after each change."""
        sent = None
        while True:
            changed, state = self._changed, self.state(request.service)
            if state != sent:
                sent = state
                yield HealthCheckResponse(status=state)
            else:
                await changed.wait()
