"""What the server has: models and their layers, methods, metrics and their parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from camserve import wire
from camserve.v1 import explain_pb2 as pb

__all__ = ["Layer", "Method", "Metric", "Model", "Parameter", "methods", "metrics", "models"]


@dataclass(frozen=True)
class Layer:
    """A layer's module name, and what it puts out: its shape in channels and pixels.

    `signed` is True where that has been seen to be negative; `prefix_tokens` counts the tokens before those of the
    grid, such as a transformer's class token, which are left out of maps.
    """

    name: str
    channels: int
    height: int
    width: int
    signed: bool
    prefix_tokens: int


@dataclass(frozen=True)
class Model:
    """A model that is served: `input_size` [height, width] in pixels; `head` is "softmax" or "sigmoid".

    `layers`, from fine to coarse, and `layer` are where methods of several layers and of one look by themselves;
    `named_layers` are all that can be named, in the order in which they run. `precisions` are what requests can choose
    as its arithmetic, its own `precision` first.
    """

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
    input_channels: int
    head: str
    named_layers: tuple[Layer, ...]
    precisions: tuple[str, ...]


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
    """A method, with its `equations` as text and `advice` when to take it.

    For a named model, `rows` is the most that it can take there for one target, `rows_per_target` what each further one
    adds (0 where one pass serves all), and `unavailable` why it cannot be served.

    `layers` is "none", "one" or "many"; `needs` is what else it needs of a model. It can stop early for a budget or a
    deadline if it is `anytime`; its map depends on the seed if it is `seeded`, and not on the class if it is
    `class_agnostic`.
    """

    name: str
    title: str
    paper: str
    summary: str
    layers: str
    parameters: tuple[Parameter, ...]
    rows: int
    unavailable: str
    rows_per_target: int
    needs: str
    anytime: bool
    seeded: bool
    class_agnostic: bool
    equations: str
    advice: str


@dataclass(frozen=True)
class Metric:
    """A metric. `unit` is "1" or "%"; `rows` is the most that it can take with default parameters.

    It makes so many `maps` of other images, each at the cost of the method; its value depends on the seed if it is
    `seeded`; one that `needs_truth` needs to know where the target is, by boxes or a mask.
    """

    name: str
    title: str
    paper: str
    summary: str
    unit: str
    higher_is_better: bool
    parameters: tuple[Parameter, ...]
    rows: int
    maps: int
    seeded: bool
    needs_truth: bool


# ---- from the wire --------------------------------------------------------------------------------------------------


def models(answer: pb.ListModelsResponse) -> list[Model]:
    """The models that are served, the server's first one first."""
    return [
        wire.read(Model, each, layers=_layers(each.layers), named_layers=_layers(each.named_layers))
        for each in answer.models
    ]


def methods(answer: pb.ListMethodsResponse) -> list[Method]:
    """The methods with their parameters."""
    return [wire.read(Method, each, parameters=_parameters(each)) for each in answer.methods]


def metrics(answer: pb.ListMetricsResponse) -> list[Metric]:
    """The metrics with their parameters."""
    return [wire.read(Metric, each, parameters=_parameters(each)) for each in answer.metrics]


def _layers(layers: Iterable[pb.Layer]) -> tuple[Layer, ...]:
    return tuple(wire.read(Layer, each) for each in layers)


def _parameters(owner: pb.Method | pb.Metric) -> tuple[Parameter, ...]:
    return tuple(
        wire.read(
            Parameter,
            each,
            minimum=each.minimum if each.HasField("minimum") else None,
            maximum=each.maximum if each.HasField("maximum") else None,
        )
        for each in owner.parameters
    )
