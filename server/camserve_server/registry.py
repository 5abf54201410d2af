"""Methods and metrics by name. A decorated function is all that there is to register one.

    @method("score-cam", title="Score-CAM", paper="arXiv:1910.01279", rows=lambda s: s.channels[0])
    def score_cam(x: Image, c: Targets, layer: str, *, batch: Annotated[int, Range(1, 9), "…"] = 3) -> Plan[…]:

The signature is the schema. A third positional argument `layer` or `layers` says whether the method looks at one layer
or several; keyword-only arguments are its parameters, with type, range, choices, default and meaning; one called `seed`
is the request's. The docstring is what is published: its first line is the summary, its sections `Equations:` and
`Advice:` are shown by `camserve list methods` and in docs/methods.md.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from camserve_server.errors import ConfigError, InvalidArgument, NotFound, OutOfRange
from camserve_server.plan import MetricResult, Plan, SaliencyMaps

Value = bool | int | float | str
Layers = Literal["none", "one", "many"]
Needs = Literal["", "gap", "attention"]
NEEDS: dict[Needs, str] = {
    "": "",
    "gap": "global average pooling and one linear layer at its end",
    "attention": "global self-attention and a class token",
}
REQUEST_KEYWORDS = ("seed", "explain", "truth", "predicted")  # keywords that are no parameters: the request has them
_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


@dataclass(frozen=True)
class Range:
    """Both ends are allowed."""

    minimum: float
    maximum: float


@dataclass(frozen=True)
class Parameter:
    """One parameter as it is published and checked."""

    name: str
    type: str
    default: Value
    description: str = ""
    range: Range | None = None
    choices: tuple[str, ...] = ()

    def check(self, value: object, field: str) -> Value:
        """`value` as the type of the parameter. Raises InvalidArgument or OutOfRange, naming `field`."""
        wanted = type(self.default)
        if wanted is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # the wire knows no integers
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not wanted:
            raise InvalidArgument(f"{self.name} must be of type {self.type}, not {value!r}", field=field)
        assert isinstance(value, bool | int | float | str)
        if self.choices and value not in self.choices:
            raise InvalidArgument(f"{self.name} must be one of {', '.join(self.choices)}, not {value!r}", field=field)
        if self.range and not self.range.minimum <= float(value) <= self.range.maximum:
            low, high = self.range.minimum, self.range.maximum
            raise OutOfRange(f"{self.name} must lie in [{low:g}, {high:g}], not {value!r}", field=field)
        return value


@dataclass(frozen=True)
class Sizes:
    """What the number of rows depends on: the `channels` of the layers looked at, the `targets`, the `pixels`.

    For metrics that make the map again, of other images: `again`, the rows of that.
    """

    channels: Sequence[int]
    targets: int = 1
    pixels: tuple[int, int] = (224, 224)
    rows_per_map: int = 0


@dataclass(frozen=True)
class Entry:
    """What methods and metrics have in common."""

    name: str
    title: str
    paper: str
    summary: str
    equations: str
    advice: str
    parameters: tuple[Parameter, ...]
    plan: Callable[..., Plan[Any]]
    rows: Callable[..., int]

    def check(self, given: Mapping[str, object], field: str) -> dict[str, Value]:
        """Every parameter with its value, defaults included. Raises InvalidArgument, naming the field."""
        known = {p.name: p for p in self.parameters}
        for name in given:
            if name not in known:
                names = ", ".join(known) or "none"
                raise InvalidArgument(
                    f"{self.name} has no parameter {name!r}; it has: {names}", field=f"{field}.{name}"
                )
        return {n: p.check(given[n], f"{field}.{n}") if n in given else p.default for n, p in known.items()}


@dataclass(frozen=True)
class Method(Entry):
    """A way to make saliency maps. `plan(x, c[, layer | layers], **parameters)` returns Plan[SaliencyMaps].

    `needs` is what a model must have beside layers. A method that has a `least` number of rows can stop early, once it
    has had these, for a budget or a deadline. The map of a `seeded` one depends on the seed; that of a `class_agnostic`
    one does not depend on the class.
    """

    layers: Layers
    needs: Needs
    min_rows: Callable[..., int] | None
    seeded: bool
    class_agnostic: bool


@dataclass(frozen=True)
class Metric(Entry):
    """A way to score one. `plan(x, c, S, **parameters)` returns Plan[MetricResult]; S [H, W] lies in [0, 1], T is 1.

    `given` names the keywords of it that the request has: `explain` makes the map of another image, by the same method
    for the same class; `truth` is where the target is; `predicted` is the class that the model predicts; the value of
    one with `seed` depends on it.
    """

    unit: str
    higher_is_better: bool
    request_keywords: tuple[str, ...]

    @property
    def needs_explainer(self) -> bool:
        """Whether it makes maps of other images."""
        return "explain" in self.request_keywords

    @property
    def needs_truth(self) -> bool:
        """Whether it needs to know where the target is."""
        return "truth" in self.request_keywords

    @property
    def seeded(self) -> bool:
        """Whether its value depends on the seed."""
        return "seed" in self.request_keywords


METHODS: dict[str, Method] = {}
METRICS: dict[str, Metric] = {}

F = TypeVar("F", bound=Callable[..., Plan[SaliencyMaps]])
G = TypeVar("G", bound=Callable[..., Plan[MetricResult]])


def method(
    name: str,
    *,
    title: str,
    paper: str,
    rows: Callable[..., int],
    min_rows: Callable[..., int] | None = None,
    needs: Needs = "",
    class_agnostic: bool = False,
) -> Callable[[F], F]:
    """Registers a method. `rows(sizes, **parameters)` is the most rows that it can take, `least(…)` the fewest."""

    def register(plan: F) -> F:
        arguments = [*inspect.signature(plan).parameters]
        third = arguments[2:3]
        layers: Layers = "one" if third == ["layer"] else "many" if third == ["layers"] else "none"
        _is_free(name, METHODS, plan)
        METHODS[name] = Method(
            *(name, title, paper, *_described(plan), _parameters(plan), plan, rows),
            layers=layers,
            needs=needs,
            min_rows=min_rows,
            seeded="seed" in arguments,
            class_agnostic=class_agnostic,
        )
        return plan

    return register


def metric(
    name: str, *, title: str, paper: str, rows: Callable[..., int], unit: str = "1", higher_is_better: bool
) -> Callable[[G], G]:
    """Registers a metric. `rows(sizes, **parameters)` is the most rows that it can take."""

    def register(plan: G) -> G:
        arguments = inspect.signature(plan).parameters
        _is_free(name, METRICS, plan)
        METRICS[name] = Metric(
            *(name, title, paper, *_described(plan), _parameters(plan), plan, rows),
            unit=unit,
            higher_is_better=higher_is_better,
            request_keywords=tuple(name for name in REQUEST_KEYWORDS if name in arguments),
        )
        return plan

    return register


def _is_free(name: str, table: Mapping[str, Entry], plan: Callable[..., object]) -> None:
    """Nobody takes the place of another. Raises ConfigError."""
    if name in table:
        raise ConfigError(f"{plan.__module__} brings {name!r}, which {table[name].plan.__module__} has already")


def get_method(name: str, field: str) -> Method:
    """The method of that name. Raises NotFound, listing the known ones."""
    return _get(METHODS, name, "method", field)


def get_metric(name: str, field: str) -> Metric:
    """The metric of that name. Raises NotFound, listing the known ones."""
    return _get(METRICS, name, "metric", field)


E_ = TypeVar("E_", bound=Entry)


def _get(table: Mapping[str, E_], name: str, kind: str, field: str) -> E_:
    if name not in table:
        known = ", ".join(sorted(table))
        raise NotFound(f"there is no {kind} {name!r}; there are: {known}", field=field, metadata={"known": known})
    return table[name]


def discover() -> None:
    """Imports every file of `methods/` and `metrics/`, which registers what is in them, and what is installed beside.

    A package of anybody's brings methods by an entry point in the group `camserve.methods`, naming the module that
    defines them. Raises ConfigError for one that cannot be imported.
    """
    for package in ("camserve_server.methods", "camserve_server.metrics"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
    for outside in entry_points(group="camserve.methods"):
        try:
            outside.load()
        except Exception as error:
            raise ConfigError(f"the entry point {outside.name} = {outside.value} cannot be loaded: {error}") from error


def _described(plan: Callable[..., object]) -> tuple[str, str, str]:
    """Summary, equations and advice, out of the docstring."""
    text = inspect.getdoc(plan) or ""
    sections = {"": "", "Equations": "", "Advice": ""}
    section = ""
    for line in text.splitlines():
        if line.removesuffix(":") in sections and line.endswith(":"):
            section = line.removesuffix(":")
        else:
            sections[section] += line.removeprefix("    ") + "\n"
    return sections[""].partition("\n")[0], sections["Equations"].rstrip(), sections["Advice"].strip()


def _parameters(plan: Callable[..., object]) -> tuple[Parameter, ...]:
    signature = inspect.signature(plan, eval_str=True)
    return tuple(
        _parameter(p.name, p.annotation, p.default)
        for p in signature.parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in REQUEST_KEYWORDS
    )


def _parameter(name: str, hint: Any, default: Value) -> Parameter:
    extras: Sequence[object] = ()
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return Parameter(
        name,
        _TYPES[type(default)],
        default,
        description=next((e for e in extras if isinstance(e, str)), ""),
        range=next((e for e in extras if isinstance(e, Range)), None),
        choices=choices,
    )


def method_label(name: str) -> str:
    """The method's name if there is one of that name: what callers make up must not become labels."""
    return name if not name or name in METHODS else "other"
