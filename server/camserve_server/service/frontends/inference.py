"""The RPCs of the Open Inference Protocol in a front end."""

from __future__ import annotations

from typing import Any

import grpc

from camserve_server.open_inference import inference_pb2 as pb
from camserve_server.open_inference import inference_pb2_grpc
from camserve_server.service.call import Context
from camserve_server.service.frontends.callers import FrontEndServicer
from camserve_server.service.inference.requests import converted_request
from camserve_server.service.inference.responses import infer_response


class FrontEndInferenceServicer(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Implements GRPCInferenceService by means of the engine process.

    Args:
        servicer: The servicer of ExplainService. It passes the calls on.
        channel: The channel to the engine process.
    """

    def __init__(self, servicer: FrontEndServicer, channel: grpc.aio.Channel) -> None:
        self._servicer = servicer
        self._engine: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Return that the process runs."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Return whether the server accepts requests, as Health does."""
        return await self._servicer.forward(self._engine.ServerReady, request, context)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Return whether a model is loaded and the server accepts requests."""
        return await self._servicer.forward(self._engine.ModelReady, request, context)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Return the name and the version of the server."""
        return await self._servicer.forward(self._engine.ServerMetadata, request, context)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Return the inputs and outputs of a model."""
        return await self._servicer.forward(self._engine.ModelMetadata, request, context)

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """Return the inputs and outputs of a model as Triton describes them."""
        return await self._servicer.forward(self._engine.ModelConfig, request, context)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """Return the maps of an image, and their scores if the request names metrics."""
        converted = await converted_request(request, context, self._servicer.codec)
        return infer_response(request, await self._servicer.explain("ModelInfer", converted, context))
