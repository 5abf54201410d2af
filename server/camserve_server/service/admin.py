"""What operators do to a running server: load, unload and reload models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from camserve.v1 import admin_pb2 as pb
from camserve.v1 import admin_pb2_grpc
from camserve_server.errors import ConfigError, Unservable
from camserve_server.model_pool import Shelf
from camserve_server.service import responses
from camserve_server.service.call import Context
from camserve_server.service.servicer import Servicer


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Changes the shelf of a servicer, and logs as it does."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        async with self._call("LoadModel", request.model, context) as shelf:
            return pb.LoadModelResponse(model=responses.loaded_message(await shelf.load(request.model)))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        async with self._call("UnloadModel", request.model, context) as shelf:
            await shelf.unload(request.model)
            return pb.UnloadModelResponse()

    async def ReloadModel(self, request: pb.ReloadModelRequest, context: Context) -> pb.ReloadModelResponse:
        async with self._call("ReloadModel", request.model, context) as shelf:
            return pb.ReloadModelResponse(model=responses.loaded_message(await shelf.reload(request.model)))

    @asynccontextmanager
    async def _call(self, rpc: str, model: str, context: Context) -> AsyncIterator[Shelf]:
        async with self._servicer.call(rpc, "", context) as call:
            call.facts["model"] = model[:64]
            try:
                yield self._servicer.loaded_shelf()
            except ConfigError as error:  # an operator may see what callers may not: it names files
                raise Unservable(str(error), reason="LOAD_FAILED") from error
