"""Terminal tables of answers and of the objects that a server lists."""

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
    "allowed_values",
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
    "served_methods",
]

# Distinguishes two digests and is narrow enough for two columns in a terminal.
_DIGEST_CHARACTERS = 19


def plain_table(*columns: str, **options: Any) -> Table:
    """Return a table without lines, whose long values are wrapped.

    Args:
        columns: Headings of the columns.
        options: Further arguments of `rich.table.Table`.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left", **options)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _spaced_table(*columns: str, **options: Any) -> Table:
    """Return a table with an empty line after each row, for rows of several lines."""
    return plain_table(*columns, padding=(0, 2, 1, 0), **options)


# ---- explanations ---------------------------------------------------------------------------------------------------


def map_row(
    image: Path, overlay: Path, result: SaliencyMap, explanation: Explanation, metrics: Sequence[str]
) -> list[str]:
    """Return the cells of one map in the table of `camserve explain`."""
    cost = explanation.cost
    return [
        escape(str(image)),
        escape(str(result.target)),
        f"{result.target.probability:.3f}",
        str(cost.rows),
        "cached" if cost.cached else f"{(cost.queue_ms + cost.compute_ms) / 1000:.2f} s",
        *(f"{result.scores[metric]:.4g}" if metric in result.scores else "" for metric in metrics),
        escape(str(overlay)),
    ]


def means(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Table:
    """Return the table of a study with the numbers of maps and the mean of each metric.

    Args:
        rows: Rows of the CSV file of the study, or of the Parquet files of a bulk run.
        metrics: Names of the metrics.
    """
    table = plain_table("model", "method", "done", *metrics, "failed")
    for model, method in sorted({(row["model"], row["method"]) for row in rows}):
        group = [row for row in rows if (row["model"], row["method"]) == (model, method)]
        done = [row for row in group if not row["error"]]
        values = [f"{np.mean([float(row[metric]) for row in done]):.4g}" if done else "–" for metric in metrics]
        table.add_row(escape(model), escape(method), str(len(done)), *values, str(len(group) - len(done) or ""))
    return table


def differences(replay: Replay) -> Table:
    """Return the table of the entries in which the receipt and its replay differ."""
    table = plain_table("", "receipt", "replay")
    for name, values in replay.differences.items():
        table.add_row(*map(escape, (name, *map(_entry_text, values))))
    return table


def _entry_text(value: Any) -> str:
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
    """Return the table of the pixelwise differences between saved and replayed maps.

    Args:
        replay: The replayed maps, [H, W] each.
        saved: The saved map of each target, or None if there is none.
    """
    table = plain_table("map", "largest difference", "mean difference")
    for before, after in zip(saved, replay.explanation.maps, strict=True):
        if before is None:
            continue
        if before.shape != after.saliency.shape:
            table.add_row(escape(str(after.target)), f"the saved map has another shape: {list(before.shape)}")
            continue
        difference = np.abs(after.saliency - before)
        table.add_row(escape(str(after.target)), f"{difference.max():.3g}", f"{difference.mean():.3g}")
    return table


# ---- objects that a server lists ------------------------------------------------------------------------------------

_LAYERS = {"none": "no layers", "one": "one layer", "many": "several layers"}


def model_table(models: Sequence[Model], methods: Sequence[Method]) -> Table:
    """Return the table of `camserve list models`.

    Args:
        models: The models to list.
        methods: All methods of the server.
    """
    table = _spaced_table("name", "description", "layers, fine to coarse")
    for model in models:
        if model.state != "ready":
            table.add_row(*map(escape, (model.name, f"{model.source}\n{model.state}", "")))
            continue
        height, width = model.input_size
        description = [
            model.source + (", random weights" if model.random_weights else ""),
            f"{model.state}; {model.input_channels} × {height} × {width} → {model.classes:,} classes, {model.head}",
            f"{', '.join(model.precisions)} on {', '.join(model.devices) or model.device}",
            served_methods(model, methods),
            model.digest,
            *(f"no {kind} passes: {reason}" for kind, reason in sorted(model.unavailable.items())),
            *(f"warning: {sentence}" for sentence in model.warnings),
        ]
        layers = [layer.name for layer in model.layers]
        table.add_row(*(escape("\n".join(lines)) for lines in ([model.name], description, layers)))
    return table


def served_methods(model: Model, methods: Sequence[Method]) -> str:
    """List the methods that the model can serve, or those that it cannot serve if these are fewer."""
    lacking = [method.name for method in methods if method.name not in model.methods]
    if not lacking:
        return "all methods"
    if len(lacking) < len(model.methods):
        return f"all methods except {', '.join(lacking)}"
    return f"methods: {', '.join(model.methods)}" if model.methods else "no methods"


def layer_table(model: Model, layers: Sequence[Layer]) -> Table:
    """Return the table of `camserve list layers`."""
    table = plain_table("name", "channels", "size", "signed", "prefix tokens", "default of", "cut value")
    table.caption = escape(
        f"\nlayers of {model.name} in the order in which they run\n"
        "default of: used by default by methods of one layer, or by methods of several layers\n"
        "cut value: 0 if all information in the logits passes through the layer, 1 if none does"
    )
    several = [each.name for each in model.layers]
    for layer in layers:
        table.add_row(
            escape(layer.name),
            f"{layer.channels:,}",
            f"{layer.height} × {layer.width}",
            "yes" if layer.signed else "",
            str(layer.prefix_tokens or ""),
            ", ".join(["one"] * (layer.name == model.layer) + ["several"] * (layer.name in several)),
            "" if layer.cut is None else f"{layer.cut:.2f}",
        )
    return table


def method_table(methods: Sequence[Method], model: str) -> RenderableType:
    """Return the tables of `camserve list methods`: a row for each method, and below them all parameters."""
    overview = _spaced_table("method", "description", "maximum cost")
    overview.columns[0].no_wrap = overview.columns[2].no_wrap = True  # so that the table fits into 80 characters
    overview.caption = escape(
        f"\ncost on {model} with its default layers and default parameters\n"
        "`camserve list methods NAME` shows the equations of a method and when to use it"
    )
    for method in methods:
        description = [_source(method), *_traits(method)]
        if method.unavailable:
            description.append(_unavailable(method, model))
        cells = ([method.name], description, [] if method.unavailable else _costs(method))
        overview.add_row(*(escape("\n".join(lines)) for lines in cells))
    return Group(overview, "", _parameter_table(methods))


def method_page(method: Method, model: str) -> RenderableType:
    """Return the page of `camserve list methods NAME`."""
    cost = f"on {model}: at most {', '.join(_costs(method))}"
    parts: list[RenderableType] = [
        Text(f"{method.name}: {_source(method)}", style="bold"),
        Text("\n".join([method.summary, *_traits(method)])),
        Text(_unavailable(method, model) if method.unavailable else cost),
    ]
    if method.advice:
        # The line breaks are those of the source code. Join the lines of each paragraph.
        parts += ["", Text(re.sub(r"(?<!\n)\n(?!\n)", " ", method.advice))]
    if method.equations:
        parts += ["", Padding(Text(method.equations), (0, 0, 0, 2))]
    if method.parameters:
        parts += ["", _parameter_table([method])]
    return Group(*parts)


def _source(item: Method | Metric) -> str:
    return ", ".join(filter(None, (item.title, item.paper)))


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
    text = "; ".join(name for name, holds in traits.items() if holds)
    return [needs, text] if text else [needs]


def _unavailable(method: Method, model: str) -> str:
    return f"unavailable on {model}: {method.unavailable}"


def metric_table(metrics: Sequence[Metric]) -> RenderableType:
    """Return the tables of `camserve list metrics`: a row for each metric, and below them all parameters."""
    overview = _spaced_table("metric", "description")
    for metric in metrics:
        better = "higher" if metric.higher_is_better else "lower"
        unit = "" if metric.unit == "1" else f", in {metric.unit}"
        description = [_source(metric), metric.summary, f"{better} is better{unit}; {_metric_costs(metric)}"]
        if metric.needs_truth:
            description.append("needs the position of the target (boxes or a mask)")
        overview.add_row(*(escape("\n".join(filter(None, lines))) for lines in ([metric.name], description)))
    return Group(overview, "", _parameter_table(metrics))


def _metric_costs(metric: Metric) -> str:
    """Describe the cost with default parameters."""
    rows = [_rows(metric.rows)] if metric.rows or not metric.maps else []
    maps = [f"{metric.maps:,} more map{'s' * (metric.maps != 1)}"] if metric.maps else []
    return f"at most {' and '.join(rows + maps)}"


def _parameter_table(owners: Sequence[Method | Metric]) -> Table:
    """Return the table of parameters, grouped by the methods or metrics that have the same parameters."""
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
            table.add_row(*map(escape, (each.name, allowed_values(each), default, each.description)))
    return table


def allowed_values(parameter: Parameter) -> str:
    """Describe the allowed values."""
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
