"""Tables of all methods and metrics, and the decorators that fill them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from camserve_server.errors import ConfigError, NotFound
from camserve_server.plan import MetricResult, Plan, SaliencyMaps
from camserve_server.registry.entries import REQUEST_KEYWORDS, Entry, Layers, Method, Metric, Needs, Passes
from camserve_server.registry.published import parameters, texts

METHODS: dict[str, Method] = {}
"""Registered methods by name."""

METRICS: dict[str, Metric] = {}
"""Registered metrics by name."""

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
    own_scaling: Callable[..., bool] = lambda **_: False,
    passes: Passes = "forward",
) -> Callable[[F], F]:
    """Register a method.

    Args:
        name: Name in requests.
        title: Name for people.
        paper: Identifier of the paper, "arXiv:…" or "doi:…".
        rows: Function of `Sizes` and the parameters that returns the maximum number of rows, without the row of the
            prediction. Admission uses it.
        min_rows: Function of the same arguments that returns the minimum number of rows, for a method that can stop
            early.
        needs: Property that the model must have.
        class_agnostic: True if the map is the same for every class.
        own_scaling: Function of the parameters that returns True if the maps have a `finish` function.
        passes: "gradient" for a method with `Gradient` queries, "ascend" for one with `Ascend` queries. A network that
            cannot run these passes does not offer the method.

    Returns:
        A decorator that registers a function and returns it unchanged.

    Raises:
        ConfigError: The decorator found another method with this name.
    """

    def register(plan: F) -> F:
        arguments = [*inspect.signature(plan).parameters]
        third = arguments[2:3]
        layers: Layers = "one" if third == ["layer"] else "many" if third == ["layers"] else "none"
        _require_unused(name, METHODS, plan)
        METHODS[name] = Method(
            *(name, title, paper, *texts(plan), parameters(plan), plan, rows),
            layers=layers,
            needs=needs,
            min_rows=min_rows,
            seeded="seed" in arguments,
            class_agnostic=class_agnostic,
            own_scaling=own_scaling,
            passes=passes,
        )
        return plan

    return register


def metric(
    name: str, *, title: str, paper: str, rows: Callable[..., int], unit: str = "1", higher_is_better: bool
) -> Callable[[G], G]:
    """Register a metric.

    Args:
        name: Name in requests.
        title: Name for people.
        paper: Identifier of the paper, "arXiv:…" or "doi:…".
        rows: Function of `Sizes` and the parameters that returns the maximum number of rows.
        unit: Unit of the value: "1" or "%".
        higher_is_better: True if a higher value is better.

    Returns:
        A decorator that registers a function and returns it unchanged.

    Raises:
        ConfigError: The decorator found another metric with this name.
    """

    def register(plan: G) -> G:
        arguments = inspect.signature(plan).parameters
        _require_unused(name, METRICS, plan)
        METRICS[name] = Metric(
            *(name, title, paper, *texts(plan), parameters(plan), plan, rows),
            unit=unit,
            higher_is_better=higher_is_better,
            request_keywords=tuple(keyword for keyword in REQUEST_KEYWORDS if keyword in arguments),
        )
        return plan

    return register


def _require_unused(name: str, table: Mapping[str, Entry], plan: Callable[..., object]) -> None:
    """Raise ConfigError if the name is already registered."""
    if name in table:
        owner = table[name].plan.__module__
        raise ConfigError(f"{plan.__module__} registers {name!r}, which {owner} has already registered; rename it")


def get_method(name: str, field: str) -> Method:
    """Return a registered method.

    Args:
        name: Name of the method.
        field: Field of the request, for errors.

    Returns:
        The method.

    Raises:
        NotFound: There is no such method. The error lists all names.
    """
    return _get(METHODS, name, "method", field)


def get_metric(name: str, field: str) -> Metric:
    """Return a registered metric.

    Args:
        name: Name of the metric.
        field: Field of the request, for errors.

    Returns:
        The metric.

    Raises:
        NotFound: There is no such metric. The error lists all names.
    """
    return _get(METRICS, name, "metric", field)


E_ = TypeVar("E_", bound=Entry)


def _get(table: Mapping[str, E_], name: str, kind: str, field: str) -> E_:
    if name not in table:
        names = ", ".join(sorted(table))
        raise NotFound(f"there is no {kind} {name!r}; there are: {names}", field=field, metadata={"known": names})
    return table[name]


def discover() -> None:
    """Register all methods and metrics of this package and of installed packages.

    The function imports every module of `methods/` and `metrics/`, and every module that an entry point in the group
    `camserve.methods` names.

    Raises:
        ConfigError: An entry point cannot be loaded.
    """
    for package in ("camserve_server.methods", "camserve_server.metrics"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
    for outside in entry_points(group="camserve.methods"):
        try:
            outside.load()
        except Exception as error:
            raise ConfigError(f"the entry point {outside.name} = {outside.value} cannot be loaded: {error}") from error


def method_label(name: str) -> str:
    """Return a method's name as a label of a Prometheus metric.

    Args:
        name: Name from a request, or an empty string.

    Returns:
        The name, or "other" if there is no such method: names that callers invent must not become labels.
    """
    return name if not name or name in METHODS else "other"
