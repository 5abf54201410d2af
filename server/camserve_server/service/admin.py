"""The RPCs of AdminService: load, unload and reload models on a running server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from camserve.v1 import admin_pb2 as pb
from camserve.v1 import admin_pb2_grpc
from camserve_server.errors import ConfigError, Unservable
from camserve_server.model_pool import ModelPool
from camserve_server.service import responses
from camserve_server.service.call import Context
from camserve_server.service.servicer import Servicer


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Implements AdminService: it changes the model pool of a servicer.

    Args:
        servicer: The servicer whose models it changes; it also logs the calls.
    """

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        """Load a model that is not loaded."""
        async with self._call("LoadModel", request.model, context) as models:
            return pb.LoadModelResponse(model=responses.loaded_message(await models.load(request.model)))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        """Unload a model after its running requests."""
        async with self._call("UnloadModel", request.model, context) as models:
            await models.unload(request.model)
            return pb.UnloadModelResponse()

    async def ReloadModel(self, request: pb.ReloadModelRequest, context: Context) -> pb.ReloadModelResponse:
        """Replace a loaded model by the one that the configuration file names now."""
        async with self._call("ReloadModel", request.model, context) as models:
            return pb.ReloadModelResponse(model=responses.loaded_message(await models.reload(request.model)))

    @asynccontextmanager
    async def _call(self, rpc: str, model: str, context: Context) -> AsyncIterator[ModelPool]:
        async with self._servicer.call(rpc, "", context) as call:
            call.facts["model"] = model[:64]
            try:
                yield self._servicer.loaded_models()
            except ConfigError as error:  # the message may name files, which operators may see
                raise Unservable(str(error), reason="LOAD_FAILED") from error
