"""What the command line shows of an answer: rich tables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from camserve.answers import Explanation, Replay, SaliencyMap
from camserve.catalogue import Layer, Method, Metric, Model, Parameter

__all__ = [
    "deviations",
    "differences",
    "layer_table",
    "map_row",
    "means",
    "method_page",
    "method_table",
    "metric_table",
    "model_table",
    "plain_table",
]

# Enough of a sha256 to tell two apart, and narrow enough for two of them beside each other.
_DIGEST_CHARACTERS = 19


def plain_table(*columns: str, **options: Any) -> Table:
    """Columns without lines around them; long values fold."""
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left", **options)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _spaced_table(*columns: str, **options: Any) -> Table:
    """For rows of several lines: an empty one between them."""
    return plain_table(*columns, padding=(0, 2, 1, 0), **options)


# ---- explanations ---------------------------------------------------------------------------------------------------


def map_row(image: Path, overlay: Path, shown: SaliencyMap, of: Explanation, metrics: Sequence[str]) -> list[str]:
    """One map of one image, as a row of the table that `camserve explain` ends with."""
    return [
        escape(str(image)),
        escape(str(shown.target)),
        f"{shown.target.probability:.3f}",
        str(of.cost.rows),
        f"{(of.cost.queue_ms + of.cost.compute_ms) / 1000:.2f} s",
        *(f"{shown.scores[metric]:.4g}" if metric in shown.scores else "" for metric in metrics),
        escape(str(overlay)),
    ]


def means(rows: Sequence[Mapping[str, str]], metrics: Sequence[str]) -> Table:
    """What a run over many images ends with, of the rows of its CSV: how many were done, and each metric's mean."""
    table = plain_table("model", "method", "done", *metrics, "failed")
    for model, method in sorted({(row["model"], row["method"]) for row in rows}):
        of = [row for row in rows if (row["model"], row["method"]) == (model, method)]
        done = [row for row in of if not row["error"]]
        values = [f"{np.mean([float(row[metric]) for row in done]):.4g}" if done else "–" for metric in metrics]
        table.add_row(escape(model), escape(method), str(len(done)), *values, str(len(of) - len(done) or ""))
    return table


def differences(replay: Replay) -> Table:
    """What a replay found to differ: of the receipt, and now."""
    table = plain_table("", "receipt", "now")
    for name, values in replay.differences.items():
        table.add_row(*map(escape, (name, *map(_entry, values))))
    return table


def _entry(value: Any) -> str:
    match value:
        case None:
            return "–"
        case str() if value.startswith("sha256:"):
            return value[:_DIGEST_CHARACTERS] + "…"
        case str():
            return value
        case _:
            return json.dumps(value)


def deviations(replay: Replay, saved: Sequence[NDArray[Any] | None]) -> Table:
    """How far each map, [H, W], is from the one that was saved, pixel by pixel; None for one that was not."""
    table = plain_table("map", "largest difference", "mean difference")
    for then, now in zip(saved, replay.explanation.maps, strict=True):
        if then is None:
            continue
        if then.shape != now.saliency.shape:
            table.add_row(escape(str(now.target)), f"the saved map has another shape: {list(then.shape)}")
            continue
        difference = np.abs(now.saliency - then)
        table.add_row(escape(str(now.target)), f"{difference.max():.3g}", f"{difference.mean():.3g}")
    return table


# ---- what the server has --------------------------------------------------------------------------------------------

_LAYERS = {"none": "no layers", "one": "one layer", "many": "several layers"}


def model_table(models: Sequence[Model], methods: Sequence[Method]) -> Table:
    """What `camserve list models` shows."""
    table = _spaced_table("name", "what it is", "layers, fine to coarse")
    for model in models:
        if model.state != "ready":
            table.add_row(*map(escape, (model.name, f"{model.source}\n{model.state}", "")))
            continue
        height, width = model.input_size
        about = [
            model.source + (", random weights" if model.random_weights else ""),
            f"{model.state}; {model.input_channels} × {height} × {width} → {model.classes:,} classes, {model.head}",
            f"{', '.join(model.precisions)} on {model.device}",
            _served(model, methods),
            model.digest,
        ]
        layers = [layer.name for layer in model.layers]
        table.add_row(*(escape("\n".join(lines)) for lines in ([model.name], about, layers)))
    return table


def _served(model: Model, methods: Sequence[Method]) -> str:
    """Which of the methods the model can serve, by the shorter list."""
    lacking = [method.name for method in methods if method.name not in model.methods]
    if not lacking:
        return "all methods"
    if len(lacking) < len(model.methods):
        return f"all methods but {', '.join(lacking)}"
    return f"methods: {', '.join(model.methods)}" if model.methods else "no methods"


def layer_table(model: Model, layers: Sequence[Layer]) -> Table:
    """What `camserve list layers` shows."""
    table = plain_table("name", "channels", "size", "signed", "prefix tokens", "default of")
    table.caption = escape(f"\nlayers of {model.name} as they run; default of methods of one or of several layers")
    several = [each.name for each in model.layers]
    for layer in layers:
        table.add_row(
            escape(layer.name),
            f"{layer.channels:,}",
            f"{layer.height} × {layer.width}",
            "yes" if layer.signed else "",
            str(layer.prefix_tokens or ""),
            ", ".join(["one"] * (layer.name == model.layer) + ["several"] * (layer.name in several)),
        )
    return table


def method_table(methods: Sequence[Method], model: str) -> RenderableType:
    """What `camserve list methods` shows: one row each, and below the parameters of all."""
    overview = _spaced_table("method", "what it is", "cost")
    overview.columns[0].no_wrap = overview.columns[2].no_wrap = True  # for 80 characters a line
    overview.caption = escape(
        f"\nat most, on {model} with its own layers and default parameters\n"
        "`camserve list methods NAME` shows one with its equations, and when to take it"
    )
    for method in methods:
        about = [_source(method), *_traits(method)]
        if method.unavailable:
            about.append(_unavailable(method, model))
        cells = ([method.name], about, [] if method.unavailable else _costs(method))
        overview.add_row(*(escape("\n".join(lines)) for lines in cells))
    return Group(overview, "", _parameter_table(methods))


def method_page(method: Method, model: str) -> RenderableType:
    """What `camserve list methods NAME` shows."""
    cost = f"on {model}: at most {', '.join(_costs(method))}"
    parts: list[RenderableType] = [
        Text(f"{method.name}: {_source(method)}", style="bold"),
        Text("\n".join([method.summary, *_traits(method)])),
        Text(_unavailable(method, model) if method.unavailable else cost),
    ]
    if method.advice:
        # Its lines end where the source code's did.
        parts += ["", Text(re.sub(r"(?<!\n)\n(?!\n)", " ", method.advice))]
    if method.equations:
        parts += ["", Padding(Text(method.equations), (0, 0, 0, 2))]
    if method.parameters:
        parts += ["", _parameter_table([method])]
    return Group(*parts)


def _source(of: Method | Metric) -> str:
    return ", ".join(filter(None, (of.title, of.paper)))


def _costs(method: Method) -> list[str]:
    more = f"+ {method.rows_per_target:,} per further target" if method.rows_per_target else "all targets in one pass"
    return [_rows(method.rows), more]


def _rows(rows: int) -> str:
    return f"{rows:,} row{'s' * (rows != 1)}"


def _traits(method: Method) -> list[str]:
    needs = _LAYERS.get(method.layers, method.layers) + (f"; needs {method.needs}" if method.needs else "")
    traits = {
        "can stop early": method.anytime,
        "seeded": method.seeded,
        "the same for every class": method.class_agnostic,
    }
    said = "; ".join(name for name, holds in traits.items() if holds)
    return [needs, said] if said else [needs]


def _unavailable(method: Method, model: str) -> str:
    return f"not on {model}: {method.unavailable}"


def metric_table(metrics: Sequence[Metric]) -> RenderableType:
    """What `camserve list metrics` shows: one row each, and below the parameters of all."""
    overview = _spaced_table("metric", "what it is")
    for metric in metrics:
        better = "higher" if metric.higher_is_better else "lower"
        unit = "" if metric.unit == "1" else f", in {metric.unit}"
        about = [_source(metric), metric.summary, f"{better} is better{unit}; {_metric_costs(metric)}"]
        if metric.needs_truth:
            about.append("needs to know where the target is")
        overview.add_row(*(escape("\n".join(filter(None, lines))) for lines in ([metric.name], about)))
    return Group(overview, "", _parameter_table(metrics))


def _metric_costs(metric: Metric) -> str:
    """As of default parameters."""
    rows = [_rows(metric.rows)] if metric.rows or not metric.maps else []
    maps = [f"{metric.maps:,} map{'s' * (metric.maps != 1)} more"] if metric.maps else []
    return f"at most {' and '.join(rows + maps)}"


def _parameter_table(owners: Sequence[Method | Metric]) -> Table:
    """Below the name of each method or metric, or the names of all that have the same."""
    table = plain_table("parameter", "values", "default", "meaning")
    owners_of: dict[tuple[Parameter, ...], list[str]] = {}
    for owner in owners:
        owners_of.setdefault(owner.parameters, []).append(owner.name)
    for parameters, names in owners_of.items():
        if table.row_count:
            table.add_row()
        if len(owners) > 1 and parameters:
            table.add_row(escape("\n".join(names)), style="bold")
        for each in parameters:
            default = "" if each.default is None else json.dumps(each.default)
            table.add_row(*map(escape, (each.name, _values(each), default, each.description)))
    return table


def _values(parameter: Parameter) -> str:
    """Those that are allowed."""
    if parameter.choices:
        return " | ".join(parameter.choices)
    match parameter.minimum, parameter.maximum:
        case None, None:
            return parameter.type
        case low, None:
            return f"{parameter.type} ≥ {low:.15g}"
        case None, high:
            return f"{parameter.type} ≤ {high:.15g}"
        case low, high:
            return f"{parameter.type} in [{low:.15g}, {high:.15g}]"
