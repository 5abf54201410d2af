"""grpc.health.v1, so that all who watch learn of a change: in grpcio's own, one who leaves takes the others along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

Context = grpc.aio.ServicerContext[Any, Any]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The state of each service, for those who ask and those who watch."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {}
        self._changed = asyncio.Event()

    def set(self, service: str, state: int) -> None:
        """From now on, that is its state. To be called on the event loop."""
        self._states[service] = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:
        if request.service not in self._states:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return HealthCheckResponse(status=self._states[request.service])

    async def Watch(self, request: HealthCheckRequest, context: Context) -> AsyncIterator[HealthCheckResponse]:
        told = None
        while True:
            changed, state = self._changed, self._states.get(request.service, HealthCheckResponse.SERVICE_UNKNOWN)
            if state != told:
                told = state
                yield HealthCheckResponse(status=state)
            else:
                await changed.wait()
