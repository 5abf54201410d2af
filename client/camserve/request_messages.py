"""Functions that build the request of each RPC without sending it.

Each function converts its arguments to a request message and returns a `PreparedCall`, which also contains the function
that converts the response. `camserve.Client` and `camserve.aio.Client` send the prepared calls. The methods of both
clients take their signatures and docstrings from these functions (see `camserve.method_docs`), so each "Returns"
section describes the result of the client's method.
"""

# The annotations must not be postponed: `camserve.method_docs` reads them at run time.
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from camserve import catalogue, images, map_format, request_fields, responses
from camserve.answers import Evaluation, Explanation, Level, Progress, Randomised, Replay
from camserve.catalogue import Method, Metric, Model
from camserve.errors import InvalidArgument
from camserve.images import ImageLike
from camserve.receipt import Receipt
from camserve.request_fields import BoxesLike, Parameters, TargetLike
from camserve.v1 import explain_pb2 as pb

__all__ = [
    "DEFAULT_METRICS",
    "BoxesLike",
    "Parameters",
    "PreparedCall",
    "StreamableCall",
    "TargetLike",
    "evaluate",
    "explain",
    "list_methods",
    "list_metrics",
    "list_models",
    "replay",
]

ResultT = TypeVar("ResultT")
EventT = TypeVar("EventT")

# The metrics that `evaluate` and `evaluate_many` compute if the caller names none.
DEFAULT_METRICS = ("insertion", "deletion", "average-gain")


@dataclass(frozen=True)
class PreparedCall(Generic[ResultT]):
    """One call of an RPC that has not been sent yet.

    Attributes:
        rpc: Name of the RPC, such as "Explain".
        request: The request message.
        parse_response: Function that converts the response message to the result.
        timeout: Timeout in seconds; None means the timeout of the client.
    """

    rpc: str
    request: Message
    parse_response: Callable[[Any], ResultT]
    timeout: float | None = None


@dataclass(frozen=True)
class StreamableCall(PreparedCall[ResultT], Generic[ResultT, EventT]):
    """A prepared call of a unary RPC that also has a streaming variant. The last event of the stream is the result."""

    def as_stream(self) -> PreparedCall[EventT | None]:
        """Return the same call for the streaming RPC. Its parser returns None for unknown kinds of events."""
        parse_event: Callable[[Any], Any] = functools.partial(responses.event, parse_result=self.parse_response)
        return PreparedCall(f"{self.rpc}Stream", self._stream_request(), parse_event, self.timeout)

    def with_heartbeats(self) -> PreparedCall[ResultT | None]:
        """Return the same call for the streaming RPC without progress and maps before the result.

        Its parser returns None for all other events.
        """

        def parse(event: Any) -> ResultT | None:
            return self.parse_response(event.result) if event.WhichOneof("event") == "result" else None

        request = self._stream_request(heartbeats_only=True)
        return PreparedCall(f"{self.rpc}Stream", request, parse, self.timeout)

    def _stream_request(self, **options: bool) -> Message:
        request_type: Any = {"Explain": pb.ExplainStreamRequest, "Evaluate": pb.EvaluateStreamRequest}[self.rpc]
        request: Message = request_type(request=self.request, **options)
        return request


def explain(
    image: ImageLike,
    *,
    model: str | None = None,
    method: str = "poly-cam",
    target: TargetLike | Sequence[TargetLike] | None = None,
    top_k: int | None = None,
    layers: str | Sequence[str] | None = None,
    parameters: Parameters | None = None,
    metrics: str | Sequence[str] | Mapping[str, Parameters] = (),
    seed: int = 0,
    budget: int | None = None,
    batch_sizes: Mapping[str, int] | None = None,
    precision: str | None = None,
    priority: str | None = None,
    boxes: BoxesLike | None = None,
    mask: object = None,
    predictions: int = 5,
    raw: bool = False,
    map_dtype: str | None = None,
    native_maps: bool = False,
    request_id: str | None = None,
    timeout: float | None = None,
) -> StreamableCall[Explanation, Progress | Level | Randomised | Explanation]:
    """Explain which parts of an image support a class.

    Args:
        image: Path of an image file, bytes of an encoded file, Pillow image, uint8 pixels [H, W, 3] or grey [H, W], or
            a float32 tensor [3, H, W] ([1, H, W] for a grey-scale model). The server uses a tensor without
            preprocessing, so it must have the model's input size. An alpha channel is dropped.
        model: Name of the model. None selects the server's first model.
        method: Name of the method; `methods()` lists the names.
        target: Class index, class label, or a sequence of them for one map each. None selects the predicted class.
        top_k: Number of most probable classes to explain, 1 to 64, one map each. Excludes `target`.
        layers: Names of layers (modules of the model), from fine to coarse. None selects the model's default layers.
        parameters: Parameters of the method that differ from their defaults, by name.
        metrics: Names of metrics that score each map, or a mapping from names to parameters.
        seed: Seed of all random numbers of the request, 0 to 2⁶⁴ − 1.
        budget: Maximum number of rows (inputs of the model), metrics included, at least 1. Methods that can stop early
            do so, and `share` of the map says which part of the work is complete. The server refuses other methods if
            they need more rows. None means no limit.
        batch_sizes: Batch size of each kind of lane of the server, each at least 1, as in a receipt. The same sizes
            give bitwise identical maps on the same CPU with the same number of threads.
        precision: Arithmetic of the model, one of its `precisions`, such as "bf16". None selects the model's default.
        priority: "low", "normal" or "high". It affects when the server processes the request, not the result. None
            means "normal", or "low" if the caller may use only "low".
        boxes: Position of the target for localisation metrics: (left, top, right, bottom), or a sequence of such boxes,
            in pixels of the upright image. The right and bottom edges are exclusive.
        mask: Position of the target as booleans or values in [0, 1], [H, W], where 1 marks the target. The mask covers
            the whole image at any resolution. With both `boxes` and `mask`, metrics on boxes use the boxes and metrics
            on pixels use the mask. Boxes and mask apply to all targets of the request.
        predictions: Number of most probable classes to return, 1 to 1000.
        raw: True to also return each map at its original resolution.
        map_dtype: Type in which the server sends the maps: "float32" (the default), "float16" (rounding error at most
            0.00025) or "uint8" (at most 0.002). The maps of the result are float32 in any case.
        native_maps: True to receive the maps at the resolution of the method, for example 7×7. The client resizes them
            to the model's input size; the values differ by less than 1e-6.
        request_id: Name of the request in logs and errors, at most 128 printable characters. None lets the server
            choose a name.
        timeout: Timeout in seconds, retries included. None means the timeout of the client.

    Returns:
        The explanation of the first target, with a float32 map [H, W] in [0, 1] at the model's input size that covers
        the whole image. `maps` contains the maps of all targets, in the order of the targets.

    Raises:
        OSError: The image file cannot be read.
        TypeError: An argument has an unsupported type.
        InvalidArgument: An argument has an invalid value; `field` names it.
        NotFound: The server has no such model, method or metric.
        FailedPrecondition: The model does not support the method, is unloaded, or cannot be loaded.
        ResourceExhausted: The server is busy (`retry_after_s` is set), or the request is too large.
        DeadlineExceeded: The call did not finish within the timeout.
        Unavailable: The server cannot be reached, is loading its models, or is shutting down.
        CamserveError: The call failed for another reason; see `camserve.errors` for all subclasses.
    """
    targets = request_fields.target_messages(target)
    if targets and top_k is not None:
        raise InvalidArgument("both target and top_k are set; expected at most one of them", field="top_k")
    image_message = images.to_wire(image)
    request = pb.ExplainRequest(
        request_id=request_id or "",
        model=model or "",
        image=image_message,
        method=request_fields.method_spec(method, parameters, layers, seed),
        targets=targets,
        target_top_k=request_fields.positive_or_unset(top_k, "top_k"),
        metrics=request_fields.metric_specs(metrics),
        top_k=request_fields.positive_or_unset(predictions, "predictions"),
        raw=raw,
        map_format=map_format.to_wire(map_dtype, native_maps),
        budget=request_fields.positive_or_unset(budget, "budget", 2**63 - 1),
        batch_sizes=request_fields.batch_sizes(batch_sizes),
        precision=precision or "",
        priority=priority or "",
        truth=request_fields.truth_message(boxes, mask, image_message),
    )
    images.check_size(request.ByteSize(), "the request")
    parse = functools.partial(responses.explanation, image=image_message)
    return StreamableCall("Explain", request, parse, timeout)


def evaluate(
    image: ImageLike,
    *,
    saliency: object = None,
    method: str | None = None,
    metrics: str | Sequence[str] | Mapping[str, Parameters] = DEFAULT_METRICS,
    model: str | None = None,
    target: TargetLike | None = None,
    layers: str | Sequence[str] | None = None,
    parameters: Parameters | None = None,
    seed: int = 0,
    budget: int | None = None,
    batch_sizes: Mapping[str, int] | None = None,
    precision: str | None = None,
    priority: str | None = None,
    boxes: BoxesLike | None = None,
    mask: object = None,
    map_dtype: str | None = None,
    native_maps: bool = False,
    request_id: str | None = None,
    timeout: float | None = None,
) -> StreamableCall[Evaluation, Progress | Randomised | Evaluation]:
    """Score a saliency map of an image. Pass either the map or the method that computes it.

    Args:
        image: The image, in any form that `explain` accepts.
        saliency: Saliency map [H, W] with real values in [0, 1]. The server resizes it to the model's input size.
        method: Name of the method that computes the map. Excludes `saliency`.
        metrics: Names of metrics, at least one, or a mapping from names to parameters; `metrics()` lists the names.
        model: Name of the model. None selects the server's first model.
        target: Index or label of the class that the map explains. None selects the predicted class.
        layers: Names of the layers of `method`, from fine to coarse. None selects the model's default layers.
        parameters: Parameters of `method` that differ from their defaults, by name.
        seed: Seed of all random numbers of the metrics and the method, 0 to 2⁶⁴ − 1.
        budget: Maximum number of rows (inputs of the model), metrics included, at least 1, as for `explain`. None means
            no limit.
        batch_sizes: Batch size of each kind of lane of the server, each at least 1, as in a receipt.
        precision: Arithmetic of the model, one of its `precisions`. None selects the model's default.
        priority: "low", "normal" or "high". None means "normal", or "low" if the caller may use only
            "low".
        boxes: Position of the target for localisation metrics, as boxes in pixels, as for `explain`.
        mask: Position of the target for localisation metrics, as a mask [H, W], as for `explain`.
        map_dtype: Type in which the server sends the map, as for `explain`.
        native_maps: True to receive the map of `method` at the resolution of the method, as for `explain`. It has no
            effect on `saliency`.
        request_id: Name of the request in logs and errors, at most 128 printable characters. None lets the server
            choose a name.
        timeout: Timeout in seconds, retries included. None means the timeout of the client.

    Returns:
        The float32 map [H, W] in [0, 1] that was scored, with its `scores` by metric.

    Raises:
        OSError: The image file cannot be read.
        TypeError: An argument has an unsupported type.
        InvalidArgument: An argument has an invalid value; `field` names it.
        NotFound: The server has no such model, method or metric.
        FailedPrecondition: The model does not support the method, is unloaded, or cannot be loaded.
        ResourceExhausted: The server is busy (`retry_after_s` is set), or the request is too large.
        DeadlineExceeded: The call did not finish within the timeout.
        Unavailable: The server cannot be reached, is loading its models, or is shutting down.
        CamserveError: The call failed for another reason; see `camserve.errors` for all subclasses.
    """
    if (saliency is None) == (method is None):
        problem = "neither is set" if method is None else "both are set"
        raise InvalidArgument(f"expected either saliency or method, but {problem}", field="saliency")
    if method is None and (parameters or layers):
        raise InvalidArgument(
            "parameters and layers apply to a method, but saliency is set; remove them", field="method"
        )
    image_message = images.to_wire(image)
    request = pb.EvaluateRequest(
        request_id=request_id or "",
        model=model or "",
        image=image_message,
        saliency=None if saliency is None else images.map_to_wire(saliency),
        method=None if method is None else request_fields.method_spec(method, parameters, layers, seed),
        target=None if target is None else request_fields.target_message(target),
        metrics=request_fields.metric_specs(metrics),
        seed=request_fields.seed_value(seed),
        budget=request_fields.positive_or_unset(budget, "budget", 2**63 - 1),
        batch_sizes=request_fields.batch_sizes(batch_sizes),
        precision=precision or "",
        priority=priority or "",
        truth=request_fields.truth_message(boxes, mask, image_message),
        map_format=map_format.to_wire(map_dtype, native_maps),
    )
    images.check_size(request.ByteSize(), "the request")
    return StreamableCall("Evaluate", request, functools.partial(responses.evaluation, image=image_message), timeout)


def replay(
    receipt: Receipt, image: ImageLike, *, request_id: str | None = None, timeout: float | None = None
) -> StreamableCall[Replay, Progress | Level | Replay]:
    """Compute the maps of a receipt again and compare them with the receipt.

    The request repeats the model, method, parameters, layers, targets, seed, precision, budget and batch sizes of the
    receipt.

    Args:
        receipt: Receipt of an explanation, or of an evaluation of a method. `Receipt.from_json` reads one from a file.
        image: The image that was explained, in any form that `explain` accepts.
        request_id: Name of the request in logs and errors, at most 128 printable characters. None lets the server
            choose a name.
        timeout: Timeout in seconds, retries included. None means the timeout of the client.

    Returns:
        The new explanation, whether its maps are bitwise identical to those of the receipt, and all differences.

    Raises:
        OSError: The image file cannot be read.
        TypeError: The image has an unsupported type.
        InvalidArgument: The receipt has no method or no map digests, or the image is invalid.
        NotFound: The server does not have the model or the method of the receipt.
        FailedPrecondition: The model does not support the method, is unloaded, or cannot be loaded.
        ResourceExhausted: The server is busy (`retry_after_s` is set), or the request is too large.
        DeadlineExceeded: The call did not finish within the timeout.
        Unavailable: The server cannot be reached, is loading its models, or is shutting down.
        CamserveError: The call failed for another reason; see `camserve.errors` for all subclasses.
    """
    if not receipt.method:
        raise InvalidArgument(
            "the receipt names no method because the caller supplied the map; only maps that a method computed can "
            "be replayed",
            field="receipt.method",
        )
    if not receipt.map_digests:
        raise InvalidArgument(
            "the receipt contains no map digests to compare with; explain the image again to get a new receipt",
            field="receipt.map_digests",
        )
    call = explain(
        image,
        model=receipt.model,
        method=receipt.method,
        target=receipt.targets,
        layers=receipt.layers,
        parameters=receipt.parameters,
        seed=receipt.seed,
        budget=receipt.budget or None,
        batch_sizes=receipt.batch_sizes,
        precision=receipt.precision,
        request_id=request_id,
        timeout=timeout,
    )

    def parse(response: pb.ExplainResponse) -> Replay:
        return responses.replay(receipt, now=call.parse_response(response))

    return StreamableCall(call.rpc, call.request, parse, call.timeout)


def list_models(*, timeout: float | None = None) -> PreparedCall[list[Model]]:
    """List the models of the server.

    Args:
        timeout: Timeout in seconds, retries included. None means the timeout of the client.

    Returns:
        All models, the server's default first.

    Raises:
        CamserveError: The call failed; see `camserve.errors` for all subclasses.
    """
    return PreparedCall("ListModels", pb.ListModelsRequest(), catalogue.models, timeout)


def list_methods(model: str | None = None, *, timeout: float | None = None) -> PreparedCall[list[Method]]:
    """List the explanation methods and their parameters.

    Args:
        model: Name of a model. The result then also contains the number of rows that each method needs on this model,
            and the reason if the model does not support it.
        timeout: Timeout in seconds, retries included. None means the timeout of the client.

    Returns:
        All methods of the server.

    Raises:
        NotFound: The server has no such model.
        CamserveError: The call failed for another reason; see `camserve.errors` for all subclasses.
    """
    return PreparedCall("ListMethods", pb.ListMethodsRequest(model=model or ""), catalogue.methods, timeout)


def list_metrics(*, timeout: float | None = None) -> PreparedCall[list[Metric]]:
    """List the metrics, their parameters and their units.

    Args:
        timeout: Timeout in seconds, retries included. None means the timeout of the client.

    Returns:
        All metrics of the server.

    Raises:
        CamserveError: The call failed; see `camserve.errors` for all subclasses.
    """
    return PreparedCall("ListMetrics", pb.ListMetricsRequest(), catalogue.metrics, timeout)
