"""The model that the SDK of KServe serves: it forwards each request to a camserve server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import kserve
from grpc_interceptor.exceptions import GrpcException
from kserve import InferRequest, InferResponse
from opentelemetry import context as trace_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from camserve import aio
from camserve.answers import Explanation
from camserve.errors import CamserveError, InvalidArgument
from camserve_kserve import requests, responses

__all__ = ["Explainer"]

# Envoy, which Istio and other gateways of KServe use, tells with this header how long it waits for the response.
_TIME_LEFT = "x-envoy-expected-rq-timeout-ms"
_MAX_DIGITS = 12  # of this number
_IN_FLIGHT = 8  # images of one request that are explained at the same time


class Explainer(kserve.Model):  # type: ignore[misc] # The SDK has no annotations.
    """Explainer that uses a camserve server.

    Args:
        name: Name of the model in the paths of KServe, which is that of the InferenceService.
        client: Client of the camserve server.
        model: Name of the camserve model. None selects the server's first model.
    """

    def __init__(self, name: str, client: aio.Client, model: str | None) -> None:
        super().__init__(name)
        self._client = client
        self._model = model
        self.ready = True  # The SDK asks before each request. Probes ask the server, see `Dataplane`.

    async def explain(self, payload: Any, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Answer a request of the v1 protocol.

        Args:
            payload: The JSON object, or the body if its content type is not JSON.
            headers: Headers of the request, with names in lower case.

        Returns:
            "explanations": one object for each image; "predictions": the most probable classes of each image.

        Raises:
            CamserveError: The request is wrong, or the camserve server cannot answer it.
        """
        images = await asyncio.to_thread(requests.of_instances, payload)
        limit = asyncio.Semaphore(_IN_FLIGHT)

        async def explained(position: int, image: requests.ImageRequest) -> Explanation:
            async with limit:
                try:
                    suffix = f"/{position}" if len(images) > 1 else ""
                    return await self._explain(image, headers or {}, lambda given: given and given + suffix)
                except CamserveError as error:
                    if len(images) > 1:
                        error.message = f"instances[{position}]: {error.message}"
                    raise

        tasks = [asyncio.create_task(explained(i, image)) for i, image in enumerate(images)]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return {
            "predictions": [[vars(each) for each in one.predictions] for one in found],
            "explanations": [
                responses.explanation(one, image.saliency_format) for one, image in zip(found, images, strict=True)
            ],
        }

    async def predict(self, payload: Any, headers: Mapping[str, str] | None = None) -> InferResponse:
        """Answer a request of the v2 protocol, which has no other call for explanations than that for predictions.

        Args:
            payload: The request of REST or gRPC.
            headers: Headers of REST or metadata of gRPC, with names in lower case.

        Raises:
            CamserveError: A request of REST failed.
            GrpcException: A request of gRPC failed.
        """
        if not isinstance(payload, InferRequest):
            error = CamserveError("this is an explainer; send the request to :explain, or use the v2 protocol")
            error.code = grpc.StatusCode.UNIMPLEMENTED
            raise error
        try:
            image = await asyncio.to_thread(requests.of_tensors, payload)
            found = await self._explain(image, headers or {}, lambda given: payload.id or given)
            return await asyncio.to_thread(responses.tensors, found, payload)
        except CamserveError as error:
            if payload.from_grpc:
                raise GrpcException(str(error), error.code) from error
            raise

    async def _explain(
        self, request: requests.ImageRequest, headers: Mapping[str, str], request_id: Callable[[str | None], str | None]
    ) -> Explanation:
        token = trace_context.attach(TraceContextTextMapPropagator().extract(headers))
        try:
            return await self._client.explain(
                request.image,
                model=self._model,
                request_id=request_id(headers.get("x-request-id")),
                timeout=self._timeout_s(headers),
                **request.arguments,
            )
        except TypeError as error:  # an argument that ExplainRequest cannot express
            raise InvalidArgument(str(error), field="parameters") from error
        finally:
            trace_context.detach(token)

    def _timeout_s(self, headers: Mapping[str, str]) -> float | None:
        """Return the shorter one of the timeouts of the gateway and the client, in seconds."""
        left = headers.get(_TIME_LEFT, "")
        if not (left.isascii() and left.isdigit() and len(left) <= _MAX_DIGITS and int(left)):
            return self._client.timeout
        return min(int(left) / 1000, self._client.timeout or float("inf"))

    def get_input_types(self) -> list[dict[str, Any]]:
        """Return the input of the v2 protocol."""
        return [{"name": "image", "datatype": "UINT8", "shape": [1, -1, -1, 3]}]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Return the outputs of the v2 protocol for T targets, H×W pixels and M metrics."""
        shapes = {"saliency": [-1, -1, -1], "target": [-1], "probability": [-1], "scores": [-1, -1]}
        types = {"saliency": "FP32", "target": "INT64", "probability": "FP64", "scores": "FP64"}
        return [{"name": name, "datatype": types[name], "shape": shapes[name]} for name in requests.OUTPUTS]
