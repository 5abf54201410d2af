"""The operations of KServe's protocols behind REST and gRPC, with the changes that an explainer needs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from kserve import InferInput, InferRequest, ModelRepository
from kserve.errors import InvalidInput
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.infer_type import RequestedOutput
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.v2_datamodels import InferenceRequest

from camserve.version import __version__

__all__ = ["Dataplane", "Repository"]

_JSON_LENGTH = "inference-header-content-length"


class Dataplane(DataPlane):  # type: ignore[misc] # The SDK has no annotations.
    """Operations of REST and gRPC.

    Args:
        models: The models that are served.
        is_ready: Asks the camserve server whether it is ready.
    """

    def __init__(self, models: ModelRepository, is_ready: Callable[[], Awaitable[bool]]) -> None:
        super().__init__(models)
        self._is_ready = is_ready

    def metadata(self) -> dict[str, Any]:
        """Return name and version of camserve instead of those of the SDK."""
        return {"name": "camserve", "version": __version__, "extensions": []}

    async def ready(self) -> bool:
        """Return True if the camserve server is ready."""
        return await self._is_ready()

    async def model_ready(self, model_name: str, disable_predictor_health_check: bool = False) -> bool:
        """Return True if the camserve server is ready.

        Args:
            model_name: Name of the model in the path of the request.
            disable_predictor_health_check: The SDK sets this before it forwards a request. The camserve client then
                finds out by itself whether the server is ready.

        Raises:
            ModelNotFound: The explainer has another name.
        """
        self.get_model_from_registry(model_name)
        return disable_predictor_health_check or await self._is_ready()

    async def explain(
        self, model_name: str, request: Any, headers: Mapping[str, str] | None = None
    ) -> tuple[Any, dict[str, str]]:
        """Explain without sending the headers of the request, such as a token, back to the caller."""
        response, _ = await super().explain(model_name, request, dict(headers or {}))
        return response, {}

    def decode_inference_request(
        self, body: bytes | InferenceRequest, headers: Mapping[str, str], model_name: str
    ) -> InferRequest:
        """Decode a request of the v2 protocol.

        The SDK converts the binary data of a request to JSON, which is slow, fails for files of images, and then logs
        the image.

        Args:
            body: Parsed JSON, or the bytes of JSON followed by binary data.
            headers: Headers of the request.
            model_name: Name of the model in the path of the request.

        Raises:
            InvalidInput: The request is malformed.
        """
        if not isinstance(body, bytes):
            return InferRequest.from_inference_request(body, model_name)
        length = headers.get(_JSON_LENGTH, "")
        if not (length.isascii() and length.isdigit()):
            raise InvalidInput(
                "the content type is not that of JSON; expected the header content-type: application/json, or, for "
                f"binary data, the header {_JSON_LENGTH} with the number of bytes of JSON"
            )
        try:
            parsed = orjson.loads(body[: int(length)])
            inputs, parts, start = [], [], int(length)
            for each in parsed["inputs"]:
                inputs.append(InferInput(each["name"], each["shape"], each["datatype"]))
                parts.append(body[start : start + each["parameters"]["binary_data_size"]])
                start += len(parts[-1])
            outputs = [RequestedOutput(each["name"], each.get("parameters")) for each in parsed.get("outputs", [])]
            return InferRequest(
                model_name, inputs, parsed.get("id"), parts, False, parsed.get("parameters"), outputs or None
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInput(
                "the JSON part of the body is malformed; expected inputs with name, shape, datatype and the parameter "
                f"binary_data_size ({type(error).__name__})"
            ) from error


class NotOffered(NotImplementedError):
    """The explainer does not offer this operation.

    Args:
        reason: Description of the problem; the SDK reads it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Repository(ModelRepositoryExtension):  # type: ignore[misc]
    """The extension that loads and unloads models, which an explainer does not offer.

    Args:
        dataplane: The operations.
    """

    def __init__(self, dataplane: Dataplane) -> None:
        super().__init__(dataplane.model_registry)

    async def load(self, model_name: str) -> None:
        """Refuse the request. Operators load models with `camserve admin`."""
        raise NotOffered("the explainer does not load models; use camserve admin")

    async def unload(self, model_name: str) -> None:
        """Refuse the request."""
        await self.load(model_name)
