"""What the server answers, as Python sees it. Arrays are float32 copies that belong to the caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from numpy.typing import NDArray

from camserve import images, notebook, picture
from camserve.errors import InternalError
from camserve.v1 import explain_pb2 as pb

__all__ = [
    "Cost",
    "Evaluation",
    "Explanation",
    "Layer",
    "Level",
    "Method",
    "Metric",
    "Model",
    "Parameter",
    "Prediction",
    "Progress",
    "Receipt",
    "SaliencyMap",
    "Score",
]

T = TypeVar("T")


# ---- maps and their scores ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """A class and what the model thinks of it: `probability` in [0, 1], `label` empty where the model has no labels."""

    index: int
    label: str
    probability: float
    logit: float

    def __str__(self) -> str:
        return f"{self.label} ({self.index})" if self.label else f"class {self.index}"


class Score(float):
    """A metric's value: a float that knows its `unit` ("1" or "%") and, where it is an area, the `curve` above it."""

    unit: str
    curve: tuple[float, ...]

    def __new__(cls, value: float, unit: str = "1", curve: Sequence[float] = ()) -> Score:
        """`curve` holds the points of the curve, from the first step to the last."""
        score = super().__new__(cls, value)
        score.unit, score.curve = unit, tuple(curve)
        return score


@dataclass(frozen=True)
class Cost:
    """What a request took: `rows` images seen by the model in `batches` device batches.

    `queue_ms` from arrival to the first batch, `compute_ms` from there to the answer, shared with others.
    """

    rows: int
    batches: int
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True)
class Receipt:
    """All that is needed to make the same map again; see the contract for each entry."""

    request_id: str
    model: str
    model_digest: str
    method: str
    parameters: dict[str, Any]
    layers: tuple[str, ...]
    targets: tuple[int, ...]
    seed: int
    precision: str
    device: str
    batch_sizes: dict[str, int]
    preprocessing: str
    versions: dict[str, str]


@dataclass(frozen=True, eq=False, repr=False)
class SaliencyMap:
    """What speaks for one class: `saliency` float32 [H, W] in [0, 1], over the whole image.

    `raw` is the map at its own resolution, float32 [h, w], where it was asked for; `scores` are those asked for, by
    metric; `warnings` is what a reader of this map must know.
    """

    target: Prediction
    saliency: NDArray[np.float32]
    raw: NDArray[np.float32] | None
    scores: dict[str, Score]
    warnings: tuple[str, ...]
    _image: pb.Image

    @property
    def curves(self) -> dict[str, NDArray[np.float64]]:
        """The curves of those scores that have one, float64 [points], by metric."""
        return {metric: np.array(score.curve) for metric, score in self.scores.items() if score.curve}

    def image(self) -> PIL.Image.Image:
        """The image that was explained: RGB, upright, at its full resolution; a tensor scaled to [0, 255]."""
        return images.picture(self._image)

    def heatmap(self) -> PIL.Image.Image:
        """The map in colours, RGB, of the image's size."""
        return picture.heatmap(self.saliency, self.image().size)

    def overlay(self, alpha: float = picture.ALPHA) -> PIL.Image.Image:
        """The map over the image, RGB, of the image's size. Where the map is 0 the image shows as it is.

        `alpha` in [0, 1] is how much the colour covers where the map is 1. Raises ValueError outside that range.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
        return picture.overlay(self.image(), self.saliency, alpha)

    def save(self, directory: str | Path, stem: str) -> tuple[Path, Path]:
        """Writes `stem`.npy (the map) and `stem`.png (the overlay), making the directory if need be; returns both."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        array, png = directory / f"{stem}.npy", directory / f"{stem}.png"
        np.save(array, self.saliency)
        self.overlay().save(png)
        return array, png

    def __repr__(self) -> str:
        height, width = self.saliency.shape
        return f"<{type(self).__name__} of {self.target}, p = {self.target.probability:.3f}, [{height}, {width}]>"


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(SaliencyMap):
    """The answer to `explain`. It is itself the map of the first target; `maps` holds those of all, in their order."""

    maps: tuple[SaliencyMap, ...]
    predictions: tuple[Prediction, ...]
    cost: Cost
    receipt: Receipt
    request_id: str

    def _repr_html_(self) -> str:
        return notebook.html(self.maps, self.receipt.model, self.receipt.method)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(SaliencyMap):
    """The answer to `evaluate`: the map that was scored, with its `scores` by metric."""

    cost: Cost
    receipt: Receipt
    request_id: str

    def _repr_html_(self) -> str:
        return notebook.html([self], self.receipt.model, self.receipt.method)


@dataclass(frozen=True)
class Progress:
    """How far a request is. `rows_total` may shrink as rows turn out not to be needed; `stage` is the work in hand."""

    rows_done: int
    rows_total: int
    stage: str


@dataclass(frozen=True, eq=False)
class Level:
    """A map on the way, from 0, the coarsest, to `count` − 1. `maps` are float32 [H, W] in [0, 1], one a target."""

    index: int
    count: int
    layer: str
    maps: tuple[NDArray[np.float32], ...] = field(repr=False)

    @property
    def saliency(self) -> NDArray[np.float32]:
        """The first target's map, float32 [H, W] in [0, 1]."""
        return self.maps[0]


# ---- what there is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer's module name and the shape of what it puts out, in channels and pixels."""

    name: str
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Model:
    """A model that is served: `input_size` [height, width] in pixels, `layers` from fine to coarse."""

    name: str
    source: str
    digest: str
    state: str
    input_size: tuple[int, ...]
    classes: int
    labels: tuple[str, ...] = field(repr=False)
    layers: tuple[Layer, ...]
    layer: str
    precision: str
    device: str
    batch_sizes: dict[str, int]
    methods: tuple[str, ...]
    random_weights: bool


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method or metric: `type` is "number", "integer", "boolean" or "string"; None is no limit."""

    name: str
    type: str
    default: Any
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class Method:
    """A method. For a named model, `rows` is the most that it can take there, `unavailable` why it cannot be served."""

    name: str
    title: str
    paper: str
    summary: str
    layers: str
    parameters: tuple[Parameter, ...]
    rows: int
    unavailable: str


@dataclass(frozen=True)
class Metric:
    """A metric. `unit` is "1" or "%"; `rows` is the most that it can take with default parameters."""

    name: str
    title: str
    paper: str
    summary: str
    unit: str
    higher_is_better: bool
    parameters: tuple[Parameter, ...]
    rows: int


# ---- from the wire --------------------------------------------------------------------------------------------------


def explanation(answer: pb.ExplainResponse, image: pb.Image) -> Explanation:
    """Raises InternalError for an answer without a map."""
    if not answer.maps:
        raise InternalError("the server answered without a saliency map", request_id=answer.request_id)
    maps = tuple(_map(each, image) for each in answer.maps)
    return Explanation(
        **vars(maps[0]),
        maps=maps,
        predictions=tuple(_read(Prediction, each) for each in answer.predictions),
        cost=_read(Cost, answer.cost),
        receipt=_read(Receipt, answer.receipt),
        request_id=answer.request_id,
    )


def evaluation(answer: pb.EvaluateResponse, image: pb.Image) -> Evaluation:
    """Raises InternalError for an answer without a map."""
    if not answer.HasField("map"):
        raise InternalError("the server answered without a saliency map", request_id=answer.request_id)
    return Evaluation(
        **vars(_map(answer.map, image)),
        cost=_read(Cost, answer.cost),
        receipt=_read(Receipt, answer.receipt),
        request_id=answer.request_id,
    )


def event(
    answer: pb.ExplainStreamResponse | pb.EvaluateStreamResponse, result: Callable[[Any], T]
) -> Progress | Level | T | None:
    """One event of a stream, the last one read by `result`; None for a kind that this client does not know yet."""
    match answer.WhichOneof("event"):
        case "progress":
            return _read(Progress, answer.progress)
        case "level":
            level: pb.Level = answer.level  # type: ignore[union-attr] # only streams of `explain` have it
            return _read(Level, level, maps=tuple(images.from_wire(each) for each in level.saliency))
        case "result":
            return result(answer.result)
        case _:
            return None


def models(answer: pb.ListModelsResponse) -> list[Model]:
    """The models that are served, the server's first one first."""
    return [_read(Model, each, layers=tuple(_read(Layer, layer) for layer in each.layers)) for each in answer.models]


def methods(answer: pb.ListMethodsResponse) -> list[Method]:
    """The methods with their parameters."""
    return [_read(Method, each, parameters=_parameters(each)) for each in answer.methods]


def metrics(answer: pb.ListMetricsResponse) -> list[Metric]:
    """The metrics with their parameters."""
    return [_read(Metric, each, parameters=_parameters(each)) for each in answer.metrics]


def _map(answer: pb.SaliencyMap, image: pb.Image) -> SaliencyMap:
    return SaliencyMap(
        target=_read(Prediction, answer.target),
        saliency=images.from_wire(answer.saliency),
        raw=images.from_wire(answer.raw) if answer.HasField("raw") else None,
        scores={each.metric: Score(each.value, each.unit, each.curve) for each in answer.scores},
        warnings=tuple(answer.warnings),
        _image=image,
    )


def _parameters(owner: pb.Method | pb.Metric) -> tuple[Parameter, ...]:
    return tuple(
        _read(
            Parameter,
            each,
            minimum=each.minimum if each.HasField("minimum") else None,
            maximum=each.maximum if each.HasField("maximum") else None,
        )
        for each in owner.parameters
    )


def _read(kind: Callable[..., T], message: Any, **given: Any) -> T:
    """A dataclass from the message's fields of the same names, but for those that are given."""
    names = (entry.name for entry in fields(kind))  # type: ignore[arg-type] # every kind here is a dataclass
    return kind(**given, **{name: _plain(getattr(message, name)) for name in names if name not in given})


def _plain(value: Any) -> Any:  # noqa: PLR0911 - a case each
    """A field's value without protobuf in it. Whole numbers of a Struct become int: on the wire all are floats."""
    match value:
        case Value():
            kind = value.WhichOneof("kind") or "null_value"
            inner = None if kind == "null_value" else getattr(value, kind)
            return int(inner) if isinstance(inner, float) and inner.is_integer() else _plain(inner)
        case Struct():
            return {key: _plain(each) for key, each in value.fields.items()}
        case ListValue():
            return [_plain(each) for each in value.values]
        case str() | bytes():
            return value
        case Mapping():
            return dict(value)
        case Sequence():
            return tuple(value)
        case _:
            return value
