"""Client of the camserve server, which explains the decisions of image classifiers.

Example:
    with camserve.Client("127.0.0.1:50051") as client:
        explanation = client.explain("dog.jpg", method="poly-cam")
    explanation.saliency                       # float32 [H, W] in [0, 1]
    explanation.overlay().save("overlay.png")

`camserve.aio.Client` is the corresponding client for asyncio.
"""

from camserve import aio
from camserve.admin import Admin
from camserve.answers import (
    Cost,
    Evaluation,
    Explanation,
    LeftOut,
    Level,
    Prediction,
    Progress,
    Randomised,
    Replay,
    SaliencyMap,
    Score,
)
from camserve.batches import Result, Variant
from camserve.catalogue import Layer, Method, Metric, Model, Parameter
from camserve.client import Client
from camserve.errors import (
    CamserveError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from camserve.receipt import Receipt
from camserve.sampler import Sampler
from camserve.version import __version__

__all__ = [
    "Admin",
    "CamserveError",
    "Cancelled",
    "Client",
    "Cost",
    "DeadlineExceeded",
    "Evaluation",
    "Explanation",
    "FailedPrecondition",
    "InternalError",
    "InvalidArgument",
    "Layer",
    "LeftOut",
    "Level",
    "Method",
    "Metric",
    "Model",
    "NotFound",
    "Parameter",
    "PermissionDenied",
    "Prediction",
    "Progress",
    "Randomised",
    "Receipt",
    "Replay",
    "ResourceExhausted",
    "Result",
    "SaliencyMap",
    "Sampler",
    "Score",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "Variant",
    "__version__",
    "aio",
]
