"""The calls, pure: arguments in, a message to send and a way to read the answer out. No channel, no waiting.

Both clients are made of these: each function lends its signature and docstring to their methods.
"""

# No postponed annotations here: the signatures are read at run time, see `described`.
import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar, get_args

import numpy as np
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from camserve import answers, catalogue, images
from camserve.answers import Evaluation, Explanation, Level, Progress, Randomised, Replay
from camserve.catalogue import Method, Metric, Model
from camserve.errors import InvalidArgument
from camserve.images import ImageLike
from camserve.receipt import Receipt
from camserve.v1 import explain_pb2 as pb

__all__ = [
    "Call",
    "Streamable",
    "described",
    "evaluate",
    "explain",
    "list_methods",
    "list_metrics",
    "list_models",
    "replay",
]

Answer = TypeVar("Answer")
Event = TypeVar("Event")

TargetLike: TypeAlias = int | str
Parameters: TypeAlias = Mapping[str, Any]
BoxesLike: TypeAlias = Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """What to send to which RPC, how to read what comes back, and how long to wait (None: as the client does)."""

    rpc: str
    request: Message
    read: Callable[[Any], Answer]
    timeout: float | None = None


@dataclass(frozen=True)
class Streamable(Call[Answer], Generic[Answer, Event]):
    """A call that can also be answered by a stream of events, the last of which is the answer."""

    def streamed(self) -> Call[Event | None]:
        """The call of the streaming twin, which by the contract wraps the same request."""
        wrap = {"Explain": pb.ExplainStreamRequest, "Evaluate": pb.EvaluateStreamRequest}[self.rpc]
        request = wrap(request=self.request)
        read: Callable[[Any], Any] = functools.partial(answers.event, result=self.read)
        return Call(f"{self.rpc}Stream", request, read, self.timeout)


# ---- the calls ------------------------------------------------------------------------------------------------------


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
    request_id: str | None = None,
    timeout: float | None = None,
) -> Streamable[Explanation, Progress | Level | Randomised | Explanation]:
    """Explain why the model sees a class in the image.

    image: a path, the bytes of an encoded file, a Pillow image, uint8 pixels [H, W, 3] or grey [H, W], or a float32
        tensor [3, H, W] (for a grey-scale model [1, H, W]) that is already preprocessed and used as it is. Alpha is
        dropped.
    model: its name; None is the server's first.
    method: its name, and `parameters` those that differ from their defaults; `methods()` lists them.
    target: a class index or label, several of them for a map each, or None for the predicted class.
    top_k: instead of `target`, how many of the likeliest classes to explain, a map each.
    layers: module names, fine to coarse; None is the model's own choice.
    metrics: names of metrics that score each map, or a mapping from names to their parameters.
    seed: all randomness of the request comes from it.
    budget: the most rows that the request may take, those of its metrics included. A method that can stop early does,
        and the map's `share` says how far it got; one that cannot is refused. None is no limit.
    batch_sizes: of the server's lanes, from a receipt: with them the same machine gives the same bits.
    precision: arithmetic of the model, one of its `precisions`, such as "bf16"; None is the model's own.
    priority: "low", "normal" or "high", as far as the caller may; None is normal. It changes when, never what.
    boxes: where the target is, for metrics of localisation: a (left, top, right, bottom), or several, in pixels of the
        image as it is given (of a photograph: upright), right and bottom behind the last pixel.
    mask: or booleans [H, W], true where the target is, over the whole image at any resolution; if both are given,
        boxes are compared with the boxes, and masses summed over the mask. Of several targets, it is that of them all.
    predictions: how many of the highest predictions to return, at least 1.
    raw: also return each map at its own resolution, before it is scaled.
    request_id: a name of your own for the request, at most 128 printable characters.
    timeout: seconds to wait for the answer; None is the client's.

    The map is float32 [H, W] in [0, 1] at the model's input size, over the whole image.

    Raises OSError for a file that cannot be read, TypeError for an unsupported kind of image, and otherwise a
    CamserveError: InvalidArgument (its `field` says where), NotFound, FailedPrecondition, ResourceExhausted,
    Unavailable, DeadlineExceeded.
    """
    targets = _targets(target)
    if targets and top_k is not None:
        raise InvalidArgument("give either the target or top_k, how many of the likeliest classes", field="top_k")
    given = images.to_wire(image)
    request = pb.ExplainRequest(
        request_id=request_id or "",
        model=model or "",
        image=given,
        method=_method(method, parameters, layers, seed),
        targets=targets,
        target_top_k=_at_least_1(top_k, "top_k"),
        metrics=_metrics(metrics),
        top_k=_at_least_1(predictions, "predictions"),
        raw=raw,
        budget=_at_least_1(budget, "budget", 2**63 - 1),
        batch_sizes=_batch_sizes(batch_sizes),
        precision=precision or "",
        priority=priority or "",
        truth=_truth(boxes, mask, given),
    )
    images.check_size(request.ByteSize(), "the request")
    return Streamable("Explain", request, functools.partial(answers.explanation, image=given), timeout)


def evaluate(
    image: ImageLike,
    *,
    saliency: object = None,
    method: str | None = None,
    metrics: str | Sequence[str] | Mapping[str, Parameters] = ("insertion", "deletion", "average-gain"),
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
    request_id: str | None = None,
    timeout: float | None = None,
) -> Streamable[Evaluation, Progress | Randomised | Evaluation]:
    """Score a saliency map of the image: one that is given, or one that a method makes.

    saliency: real numbers [H, W], in [0, 1] by custom; resized to the model's input size if it differs.
    method: or the method that makes it, with its `parameters` and `layers`. One of the two is needed.
    metrics: names of metrics, or a mapping from names to their parameters; `metrics()` lists them.
    target: the class that the map explains, an index or label; None is the predicted class.
    seed: all randomness comes from it, of the metrics and of the method.

    `image`, `model`, `budget`, `batch_sizes`, `precision`, `priority`, `boxes`, `mask`, `request_id`, `timeout` and
    what is raised are as for `explain`.
    """
    if (saliency is None) == (method is None):
        raise InvalidArgument("give either a saliency map or the method that makes one", field="saliency")
    if method is None and (parameters or layers):
        raise InvalidArgument("a given saliency map takes no parameters and no layers", field="method")
    given = images.to_wire(image)
    request = pb.EvaluateRequest(
        request_id=request_id or "",
        model=model or "",
        image=given,
        saliency=None if saliency is None else images.map_to_wire(saliency),
        method=None if method is None else _method(method, parameters, layers, seed),
        target=None if target is None else _target(target),
        metrics=_metrics(metrics),
        seed=_seed(seed),
        budget=_at_least_1(budget, "budget", 2**63 - 1),
        batch_sizes=_batch_sizes(batch_sizes),
        precision=precision or "",
        priority=priority or "",
        truth=_truth(boxes, mask, given),
    )
    images.check_size(request.ByteSize(), "the request")
    return Streamable("Evaluate", request, functools.partial(answers.evaluation, image=given), timeout)


def replay(
    receipt: Receipt,
    image: ImageLike,
    *,
    request_id: str | None = None,
    timeout: float | None = None,
) -> Streamable[Replay, Progress | Level | Replay]:
    """Make the maps of a receipt again, and compare.

    receipt: of an explanation, or of an evaluation whose map a method made; `Receipt.from_json` reads one from a file.
    image: the one that was explained.

    The maps are asked for as the receipt says: model, method, parameters, layers, targets, seed, precision, budget,
    batch sizes.

    Raises InvalidArgument for a receipt that cannot be replayed. `request_id`, `timeout` and what else is raised are as
    for `explain`.
    """
    if not receipt.method:
        raise InvalidArgument("the receipt is of a map that was given: no method made it", field="receipt.method")
    if not receipt.map_digests:
        raise InvalidArgument("the receipt has no digests of its maps to compare with", field="receipt.map_digests")
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
    return Streamable(
        call.rpc, call.request, lambda answer: answers.replay(receipt, now=call.read(answer)), call.timeout
    )


def list_models(*, timeout: float | None = None) -> Call[list[Model]]:
    """List the models that are served, the default first."""
    return Call("ListModels", pb.ListModelsRequest(), catalogue.models, timeout)


def list_methods(model: str | None = None, *, timeout: float | None = None) -> Call[list[Method]]:
    """List the methods and their parameters; for a named model, also what each costs there or why it cannot be served.

    Raises NotFound for an unknown model.
    """
    return Call("ListMethods", pb.ListMethodsRequest(model=model or ""), catalogue.methods, timeout)


def list_metrics(*, timeout: float | None = None) -> Call[list[Metric]]:
    """List the metrics, their parameters and units."""
    return Call("ListMetrics", pb.ListMetricsRequest(), catalogue.metrics, timeout)


# ---- from Python to the wire ----------------------------------------------------------------------------------------


def _method(name: str, parameters: Parameters | None, layers: str | Sequence[str] | None, seed: int) -> pb.MethodSpec:
    return pb.MethodSpec(
        name=name,
        parameters=_struct(parameters or {}, "method.parameters"),
        layers=[layers] if isinstance(layers, str) else layers or (),
        seed=_seed(seed),
    )


def _metrics(metrics: str | Sequence[str] | Mapping[str, Parameters]) -> list[pb.MetricSpec]:
    named = [metrics] if isinstance(metrics, str) else metrics
    asked = named if isinstance(named, Mapping) else {name: {} for name in named}
    return [pb.MetricSpec(name=name, parameters=_struct(given, "metrics.parameters")) for name, given in asked.items()]


def _targets(target: TargetLike | Sequence[TargetLike] | None) -> list[pb.Target]:
    if target is None:
        return []
    if isinstance(target, Sequence) and not isinstance(target, str):
        return [_target(each) for each in target]
    return [_target(target)]


def _target(target: TargetLike) -> pb.Target:
    if isinstance(target, str):
        return pb.Target(label=target)
    return pb.Target(index=_whole(target, "target", 0, 2**31 - 1))


def _batch_sizes(sizes: Mapping[str, int] | None) -> dict[str, int]:
    return {lane: _at_least_1(size, "batch_sizes") for lane, size in (sizes or {}).items()}


def _truth(boxes: BoxesLike | None, mask: object, image: pb.Image) -> pb.Truth | None:
    """Boxes in pixels of the image become shares of its width and height."""
    if boxes is None and mask is None:
        return None
    return pb.Truth(
        boxes=[] if boxes is None else _boxes(boxes, *images.size(image)),
        mask=None if mask is None else images.mask_to_wire(mask),
    )


def _boxes(boxes: BoxesLike, width: int, height: int) -> list[pb.Box]:
    sides = np.atleast_2d(np.asarray(boxes, np.float64))
    if sides.ndim != 2 or sides.shape[1] != 4 or not len(sides):
        raise InvalidArgument("boxes are one or several (left, top, right, bottom)", field="truth.boxes")
    for i, (left, top, right, bottom) in enumerate(sides):
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise InvalidArgument(
                f"a box (left, top, right, bottom) lies within the image's {width}x{height} pixels, "
                f"not ({left:g}, {top:g}, {right:g}, {bottom:g})",
                field=f"truth.boxes[{i}]",
            )
    return [pb.Box(left=a / width, top=b / height, right=c / width, bottom=d / height) for a, b, c, d in sides]


def _at_least_1(value: int | None, field: str, high: int = 2**31 - 1) -> int:
    """0 for None, which is how the wire says that nothing was given."""
    return 0 if value is None else _whole(value, field, 1, high)


def _seed(seed: int) -> int:
    return _whole(seed, "seed", 0, 2**64 - 1)


def _whole(value: int, field: str, low: int, high: int) -> int:
    """`value` as an int, numpy's integers included. Raises TypeError for others, InvalidArgument out of range."""
    number = operator.index(value)
    if not low <= number <= high:
        raise InvalidArgument(f"{field} must lie in [{low}, {high}], not {number}", field=field)
    return number


def _struct(values: Parameters, field: str) -> Struct:
    struct = Struct()
    try:
        struct.update({name: v.item() if isinstance(v, np.generic) else v for name, v in values.items()})
    except ValueError:
        raise InvalidArgument(f"parameters must be numbers, booleans or strings, not {values!r}", field=field) from None
    return struct


# ---- from a call to a method ----------------------------------------------------------------------------------------

_STREAM = """As `{name}`, but yields events on the way.

They are `Progress`; also, except for `evaluate`, each `Level` of a method that works from coarse to fine, as it is
done; except for `replay`, each map that a metric of randomisation compares, as `Randomised`; and, as the last event,
what `{name}` returns. Closing the iterator early cancels the call.
"""


def described(method: Any, call: Callable[..., Any], returns: Any = None, *, streams: bool = False) -> None:
    """Give a client's method the name, signature and docstring of its call, for `help()` and editors.

    `returns` is what the answer (or, for one that streams, the event) comes in, such as `Awaitable`.
    """
    signature = inspect.signature(call)
    answer, event = (*get_args(signature.return_annotation), None)[:2]
    inner = event if streams else answer
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(
        parameters=[this, *signature.parameters.values()], return_annotation=returns[inner] if returns else inner
    )
    name = call.__name__.removeprefix("list_")
    method.__name__ = name + "_stream" * streams
    method.__qualname__ = f"Client.{method.__name__}"
    method.__doc__ = (_STREAM.format(name=name) + "\n" if streams else "") + inspect.cleandoc(call.__doc__ or "")
