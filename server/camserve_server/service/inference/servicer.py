"""The RPCs of the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

from camserve_server.models.model import Model
from camserve_server.open_inference import inference_pb2 as pb
from camserve_server.open_inference import inference_pb2_grpc
from camserve_server.service import requests
from camserve_server.service.answers import EXPLAINED
from camserve_server.service.call import Context
from camserve_server.service.health import Health
from camserve_server.service.inference.requests import VERSION, converted_request
from camserve_server.service.inference.responses import config, infer_response, metadata
from camserve_server.service.listeners import SERVICE, SERVING
from camserve_server.service.servicer import Servicer


class InferenceServicer(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Implements GRPCInferenceService: a model of the server is one that returns maps of an image.

    Args:
        servicer: The servicer of ExplainService. It runs the requests.
        health: The states of the services.
    """

    def __init__(self, servicer: Servicer, health: Health) -> None:
        self._servicer = servicer
        self._health = health

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Return that the process runs."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Return whether the server accepts requests, as Health does."""
        return pb.ServerReadyResponse(ready=self._ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Return whether a model is loaded and the server accepts requests."""
        pool = self._servicer.models
        loaded = {settings.name for settings, _, model in pool.all() if model is not None} if pool else set()
        known = request.name in loaded and request.version in ("", VERSION)
        return pb.ModelReadyResponse(ready=self._ready and known)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Return the name and the version of the server."""
        return pb.ServerMetadataResponse(
            name="camserve", version=version("camserve"), extensions=["model_configuration"]
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Return the inputs and outputs of a model. The server loads the model first if it had to make room."""
        async with self._model("ModelMetadata", request.name, context) as model:
            return metadata(model)

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """Return the inputs and outputs of a model as Triton describes them."""
        async with self._model("ModelConfig", request.name, context) as model:
            return pb.ModelConfigResponse(config=config(model))

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """Return the maps of an image, and their scores if the request names metrics."""
        answer = replace(EXPLAINED, convert=partial(infer_response, request))
        converted = await converted_request(request, context, self._servicer.codec)
        async for message in self._servicer.run("ModelInfer", converted, context, requests.parse_explain, answer):
            response: Any = message
        inferred: pb.ModelInferResponse = response  # without kinds, the response is the only message
        return inferred

    @asynccontextmanager
    async def _model(self, rpc: str, name: str, context: Context) -> AsyncIterator[Model]:
        async with self._servicer.call(rpc, "", context), self._servicer.loaded_models().lease(name) as lease:
            yield lease.model

    @property
    def _ready(self) -> bool:
        return self._health.state(SERVICE) == int(SERVING)
