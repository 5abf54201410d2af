"""Registered methods and metrics, with their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from camserve_server.errors import InvalidArgument, OutOfRange
from camserve_server.plan import Plan

Value = bool | int | float | str
"""Value of a parameter."""

Layers = Literal["none", "one", "many"]
"""Number of layers that a method uses."""

Needs = Literal["", "gap", "attention", "ablation"]
"""Property that a model must have for a method."""

Passes = Literal["forward", "gradient", "ascend"]
"""Kind of passes through the network that a method cannot do without: the kind of lane of its queries."""

NEEDS: dict[Needs, str] = {
    "": "",
    "gap": "global average pooling and one linear layer at its end",
    "attention": "global self-attention and a class token",
    "ablation": "layers whose output can be changed",
}
"""Description of each property that a method can need."""

REQUEST_KEYWORDS = ("seed", "explain", "truth", "predicted")
"""Keyword arguments that are not parameters: their values come from the request."""


@dataclass(frozen=True)
class Range:
    """Range of a numeric parameter. Both ends are allowed.

    Attributes:
        minimum: Lowest allowed value.
        maximum: Highest allowed value.
    """

    minimum: float
    maximum: float


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method or metric, as it is published and checked.

    Attributes:
        name: Name of the parameter.
        type: JSON type: "boolean", "integer", "number" or "string".
        default: Default value. Its Python type is the type of all values.
        description: Description for callers.
        range: Allowed range, or None.
        choices: Allowed values. Empty if all values of the type are allowed.
    """

    name: str
    type: str
    default: Value
    description: str = ""
    range: Range | None = None
    choices: tuple[str, ...] = ()

    def check(self, value: object, field: str) -> Value:
        """Check a value and convert it to the type of the parameter.

        Args:
            value: Value from a request. Whole floats are accepted as integers, because the wire has only numbers.
            field: Field of the request, for errors.

        Returns:
            The value in the type of the parameter.

        Raises:
            InvalidArgument: The value has the wrong type or is not one of the choices.
            OutOfRange: The value is outside the range.
        """
        expected = type(self.default)
        if expected is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if expected is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not expected:
            raise InvalidArgument(f"{self.name} is {value!r}; expected a value of type {self.type}", field=field)
        assert isinstance(value, bool | int | float | str)
        if self.choices and value not in self.choices:
            raise InvalidArgument(f"{self.name} is {value!r}; expected one of {', '.join(self.choices)}", field=field)
        if self.range and not self.range.minimum <= float(value) <= self.range.maximum:
            low, high = self.range.minimum, self.range.maximum
            raise OutOfRange(f"{self.name} is {value!r}; expected {low:g} to {high:g}", field=field)
        return value


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the number of rows of a request.

    Attributes:
        channels: Number of channels of each layer that the method uses.
        targets: Number of targets.
        pixels: Height and width of the model's input.
        rows_per_map: For metrics that explain further images: maximum number of rows of one map.
    """

    channels: Sequence[int]
    targets: int = 1
    pixels: tuple[int, int] = (224, 224)
    rows_per_map: int = 0


@dataclass(frozen=True)
class Entry:
    """Properties that methods and metrics have in common.

    Attributes:
        name: Name in requests.
        title: Name for people.
        paper: Identifier of the paper, "arXiv:…" or "doi:…".
        summary: First line of the docstring.
        equations: Section `Equations:` of the docstring.
        advice: Section `Advice:` of the docstring.
        parameters: The parameters.
        plan: Function that returns the plan.
        rows: Function of `Sizes` and the parameters that returns the maximum number of rows.
    """

    name: str
    title: str
    paper: str
    summary: str
    equations: str
    advice: str
    parameters: tuple[Parameter, ...]
    plan: Callable[..., Plan[Any]]
    rows: Callable[..., int]

    def check(self, values: Mapping[str, object], field: str) -> dict[str, Value]:
        """Check the parameters of a request and add the defaults of the others.

        Args:
            values: Values of parameters by name.
            field: Field of the request that contains the parameters, for errors.

        Returns:
            The value of every parameter.

        Raises:
            InvalidArgument: A parameter does not exist or has the wrong type.
            OutOfRange: A value is outside its range.
        """
        parameters = {p.name: p for p in self.parameters}
        for name in values:
            if name not in parameters:
                names = ", ".join(parameters) or "none"
                raise InvalidArgument(
                    f"{self.name} has no parameter {name!r}; its parameters: {names}", field=f"{field}.{name}"
                )
        return {n: p.check(values[n], f"{field}.{n}") if n in values else p.default for n, p in parameters.items()}


@dataclass(frozen=True)
class Method(Entry):
    """Method that makes saliency maps. `plan(x, c[, layer | layers], **parameters)` returns `Plan[SaliencyMaps]`.

    Attributes:
        layers: Number of layers that it uses.
        needs: Property that the model must have.
        min_rows: Function of `Sizes` and the parameters that returns the minimum number of rows. A budget or a deadline
            can cut the method short after them. None if it cannot stop early.
        seeded: True if the map depends on the seed.
        class_agnostic: True if the map is the same for every class.
        own_scaling: Function of the parameters that returns True if the method resizes and scales its maps itself.
        passes: Kind of passes that it needs.
    """

    layers: Layers
    needs: Needs
    min_rows: Callable[..., int] | None
    seeded: bool
    class_agnostic: bool
    own_scaling: Callable[..., bool]
    passes: Passes


@dataclass(frozen=True)
class Metric(Entry):
    """Metric that scores one map. `plan(x, c, S, **parameters)` returns `Plan[MetricResult]`.

    The map S [H, W] lies in [0, 1], and `c` contains one target.

    Attributes:
        unit: Unit of the value: "1" or "%".
        higher_is_better: True if a higher value is better.
        request_keywords: Keyword arguments that the request supplies. `explain` is an `Explainer` for other images,
            `truth` is the ground truth, `predicted` is the index of the predicted class, `seed` is the request's seed.
    """

    unit: str
    higher_is_better: bool
    request_keywords: tuple[str, ...]

    @property
    def needs_explainer(self) -> bool:
        """True if the metric explains other images."""
        return "explain" in self.request_keywords

    @property
    def needs_truth(self) -> bool:
        """True if the metric needs the location of the target."""
        return "truth" in self.request_keywords

    @property
    def seeded(self) -> bool:
        """True if the value depends on the seed."""
        return "seed" in self.request_keywords
