"""Models, layers, methods and metrics of the server, and their parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from camserve import wire
from camserve.v1 import explain_pb2 as pb

__all__ = ["Layer", "Method", "Metric", "Model", "Parameter", "methods", "metrics", "models"]


@dataclass(frozen=True)
class Layer:
    """Layer of a model that methods can use.

    Attributes:
        name: Name of the module.
        channels: Number of channels of its output.
        height: Height of its output in pixels or tokens.
        width: Width of its output in pixels or tokens.
        signed: True if negative outputs have been observed.
        prefix_tokens: Number of tokens before the tokens of the grid, such as the class token of a transformer. Maps do
            not contain them.
        cut: Cut value of a default layer: 0 if all information in the logits passes through it, 1 if none does. None if
            it has not been measured, or if the logits are the same for all images.
    """

    name: str
    channels: int
    height: int
    width: int
    signed: bool
    prefix_tokens: int
    cut: float | None = None


@dataclass(frozen=True)
class Model:
    """Model of the server.

    Attributes:
        name: Name of the model in requests.
        source: Origin of the model, such as "embedded:efficientnet-lite0".
        digest: "sha256:…" of the weights.
        state: "ready", "waiting" (loaded at the next request) or "unloaded" (by an operator). If the model is not
            ready, all attributes except `name`, `source` and `state` are empty.
        input_size: (height, width) of the input in pixels.
        classes: Number of classes.
        labels: Label of each class. May be empty.
        layers: Default layers of methods that use several layers, from fine to coarse.
        layer: Name of the default layer of methods that use one layer.
        precision: Default arithmetic, such as "fp32".
        device: Kind of device, such as "cpu" or "cuda".
        batch_sizes: Batch size of each kind of lane.
        methods: Names of the methods that the model supports.
        random_weights: True if the configuration requests random weights.
        input_channels: Number of channels of the input: 3, or 1 for a grey-scale model. Models with other numbers take
            tensors only.
        head: Function that converts outputs to probabilities: "softmax", "sigmoid", or "probabilities" if the outputs
            are probabilities.
        named_layers: All layers that requests can name, in the order of execution.
        precisions: All values of `precision` that requests can select, the default first.
        unavailable: Kinds of passes that the network cannot run ("gradient" or "ascend"), with the reason. Methods that
            need them are not in `methods`.
        warnings: Sentences about limitations with which the model is served, such as a batch size of 1.
        devices: Names of the devices that hold the model. Empty if the server has one device.
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
    unavailable: dict[str, str]
    warnings: tuple[str, ...]
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """Parameter of a method or a metric.

    Attributes:
        name: Name of the parameter.
        type: "number", "integer", "boolean" or "string".
        default: Default value.
        minimum: Smallest allowed value, or None.
        maximum: Largest allowed value, or None.
        choices: Allowed values of a string. Empty if there is no such restriction.
        description: Meaning of the parameter.
    """

    name: str
    type: str
    default: Any
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class Method:
    """Explanation method.

    Attributes:
        name: Name of the method in requests.
        title: Name of the method in its paper.
        paper: Reference such as "arXiv:…".
        summary: Short description.
        layers: Number of layers that the method uses: "none", "one" or "many".
        parameters: Parameters of the method.
        rows: Maximum number of rows for one target on the requested model, with default layers and parameters.
        unavailable: Reason if the requested model does not support the method, otherwise empty.
        rows_per_target: Number of rows that each further target adds. 0 if all targets share the same rows.
        needs: Further requirements on the model. Empty if there are none.
        anytime: True if the method can stop early because of a budget or a deadline.
        seeded: True if the map depends on the seed.
        class_agnostic: True if the map is the same for every class.
        equations: Equations as text.
        advice: Recommendation when to use the method.
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
    """Metric that scores a saliency map.

    Attributes:
        name: Name of the metric in requests.
        title: Name of the metric in its paper.
        paper: Reference such as "arXiv:…".
        summary: Short description.
        unit: "1" for a value without a unit, "%" for a percentage.
        higher_is_better: True if a higher score indicates a better map.
        parameters: Parameters of the metric.
        rows: Maximum number of rows with default parameters, without the rows of `maps`.
        maps: Number of maps of other images that the metric computes. Each costs as many rows as the method needs.
        seeded: True if the score depends on the seed.
        needs_truth: True if the metric requires the position of the target as boxes or a mask.
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


# ---- conversion of responses ----------------------------------------------------------------------------------------


def models(response: pb.ListModelsResponse) -> list[Model]:
    """Convert the response of `ListModels`. The first model is the server's default."""
    return [
        wire.to_dataclass(Model, each, layers=_layers(each.layers), named_layers=_layers(each.named_layers))
        for each in response.models
    ]


def methods(response: pb.ListMethodsResponse) -> list[Method]:
    """Convert the response of `ListMethods`."""
    return [wire.to_dataclass(Method, each, parameters=_parameters(each)) for each in response.methods]


def metrics(response: pb.ListMetricsResponse) -> list[Metric]:
    """Convert the response of `ListMetrics`."""
    return [wire.to_dataclass(Metric, each, parameters=_parameters(each)) for each in response.metrics]


def _layers(layers: Iterable[pb.Layer]) -> tuple[Layer, ...]:
    return tuple(wire.to_dataclass(Layer, each, cut=each.cut if each.HasField("cut") else None) for each in layers)


def _parameters(owner: pb.Method | pb.Metric) -> tuple[Parameter, ...]:
    return tuple(
        wire.to_dataclass(
            Parameter,
            each,
            minimum=each.minimum if each.HasField("minimum") else None,
            maximum=each.maximum if each.HasField("maximum") else None,
        )
        for each in owner.parameters
    )
