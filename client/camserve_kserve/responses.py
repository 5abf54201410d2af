"""Explanations and errors of camserve → responses of KServe's protocols."""

from __future__ import annotations

import base64
import dataclasses
import math
from typing import Any

import grpc
import numpy as np
from kserve import InferOutput, InferRequest, InferResponse

from camserve.answers import Explanation, SaliencyMap
from camserve.errors import CamserveError, TooLarge
from camserve_kserve.requests import OUTPUTS

__all__ = ["error_content", "explanation", "http_status", "tensors"]

# HTTP status of each gRPC status code, as in google.rpc.Code, except for UNAUTHENTICATED: the server has refused the
# credentials of the explainer, not those of the caller.
_HTTP = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.UNAUTHENTICATED: 502,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


def explanation(found: Explanation, saliency_format: str) -> dict[str, Any]:
    """Return the JSON object of an explanation in the v1 protocol. Maps are numpy arrays, which orjson writes.

    Args:
        found: The explanation.
        saliency_format: "list" for nested lists of numbers, "base64" for the bytes of float32 in little-endian order.
    """
    return {
        "request_id": found.request_id,
        "model": found.receipt.model,
        "method": found.receipt.method,
        "maps": [_map(each, saliency_format) for each in found.maps],
        "cost": dataclasses.asdict(found.cost),
        "receipt": dataclasses.asdict(found.receipt),
    }


def _map(found: SaliencyMap, saliency_format: str) -> dict[str, Any]:
    saliency: Any = found.saliency
    if saliency_format == "base64":
        saliency = {"b64": base64.b64encode(saliency.astype("<f4").tobytes()).decode(), "shape": saliency.shape}
    return {
        "target": dataclasses.asdict(found.target),
        "saliency": saliency,
        "scores": {name: float(score) for name, score in found.scores.items()},
        "share": found.share,
        "warnings": found.warnings,
    }


def tensors(found: Explanation, request: InferRequest) -> InferResponse:
    """Return the response of the v2 protocol, with the outputs that the request names, or all."""
    metrics = [*found.scores]
    scores = [[float(each.scores[metric]) for metric in metrics] for each in found.maps]
    values: dict[str, np.ndarray[Any, Any]] = {
        "saliency": np.stack([each.saliency for each in found.maps]),
        "target": np.array([each.target.index for each in found.maps], np.int64),
        "probability": np.array([each.target.probability for each in found.maps], np.float64),
        "scores": np.array(scores, np.float64).reshape(len(found.maps), len(metrics)),
    }
    types = dict(zip(OUTPUTS, ("FP32", "INT64", "FP64", "FP64"), strict=True))
    outputs = []
    for name in [each.name for each in request.request_outputs or ()] or OUTPUTS:
        outputs.append(InferOutput(name, [*values[name].shape], types[name]))
        outputs[-1].set_data_from_numpy(values[name], binary_data=bool(request.use_binary_outputs))
    share = min(each.share for each in found.maps)
    return InferResponse(
        found.request_id,
        request.model_name,
        outputs,
        parameters={
            "method": found.receipt.method,
            "metrics": ",".join(metrics),
            "share": str(share) if request.from_grpc else share,  # The SDK sends no decimal numbers over gRPC.
            "warnings": "\n".join(dict.fromkeys(text for each in found.maps for text in each.warnings)),
            "receipt": found.receipt.to_json(),
        },
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=request.request_outputs,
    )


def http_status(error: CamserveError) -> int:
    """Return the HTTP status of an error."""
    return 413 if isinstance(error, TooLarge) else _HTTP.get(error.code, 500)


def error_content(error: CamserveError) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the JSON object and the headers of the response to a request that has failed."""
    content: dict[str, Any] = {"error": error.message, "code": error.code.name}
    for name in ("field", "reason", "request_id", "retry_after_s"):
        if value := getattr(error, name):
            content[name] = value
    retry = {"retry-after": str(math.ceil(error.retry_after_s))} if error.retry_after_s else {}
    return content, retry
