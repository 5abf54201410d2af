"""What the command line shows of an answer: rows of rich tables, and records that go out as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from camserve.answers import Evaluation, Explanation, Method, Metric, Model, Parameter, SaliencyMap


def map_record(image: Path, files: tuple[Path, Path], shown: SaliencyMap, of: Explanation) -> dict[str, Any]:
    """One map of one image, as a JSON object."""
    return {
        "image": str(image),
        "saliency": str(files[0]),
        "overlay": str(files[1]),
        "target": asdict(shown.target),
        "predictions": [asdict(each) for each in of.predictions],
        "scores": shown.scores,
        "warnings": shown.warnings,
        "cost": asdict(of.cost),
        "receipt": asdict(of.receipt),
        "request_id": of.request_id,
    }


def evaluation_record(image: Path, evaluation: Evaluation) -> dict[str, Any]:
    """The scores of one map, as a JSON object."""
    return {
        "image": str(image),
        "target": asdict(evaluation.target),
        "scores": evaluation.scores,
        "curves": {metric: score.curve for metric, score in evaluation.scores.items() if score.curve},
        "warnings": evaluation.warnings,
        "cost": asdict(evaluation.cost),
        "receipt": asdict(evaluation.receipt),
        "request_id": evaluation.request_id,
    }


def map_row(
    image: Path, files: tuple[Path, Path], shown: SaliencyMap, of: Explanation, metrics: Sequence[str]
) -> list[str]:
    """One map of one image, as a row of the table that `camserve explain` ends with."""
    return [
        escape(str(image)),
        escape(str(shown.target)),
        f"{shown.target.probability:.3f}",
        str(of.cost.rows),
        f"{(of.cost.queue_ms + of.cost.compute_ms) / 1000:.2f} s",
        *(f"{shown.scores[metric]:.4g}" if metric in shown.scores else "" for metric in metrics),
        escape(str(files[1])),
    ]


def plain_table(*columns: str) -> Table:
    """Columns without lines around them; long values fold."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def listing(found: Sequence[Model | Method | Metric]) -> Table:
    """What `camserve list` shows."""
    of_models = any(isinstance(each, Model) for each in found)
    table = plain_table("name", "what it is", "layers, fine to coarse" if of_models else "parameters")
    table.padding = (0, 2, 1, 0)  # an empty line between entries of several lines
    for each in found:
        match each:
            case Model():
                about, details = _about_model(each), [layer.name for layer in each.layers]
            case Method():
                about, details = _about_method(each), [_parameter(each) for each in each.parameters]
            case Metric():
                about, details = _about_metric(each), [_parameter(each) for each in each.parameters]
        table.add_row(*(escape("\n".join(filter(None, lines))) for lines in ([each.name], about, details)))
    return table


def _about_model(model: Model) -> list[str]:
    height, width = model.input_size
    return [
        model.source + (", random weights" if model.random_weights else ""),
        f"{model.state}; {height} × {width} pixels → {model.classes} classes",
        f"{model.precision} on {model.device}",
        model.digest,
    ]


def _about_method(method: Method) -> list[str]:
    rows = f"at most {method.rows} rows on this model" if method.rows else ""
    state = f"not on this model: {method.unavailable}" if method.unavailable else rows
    return [method.title, method.summary, method.paper, state]


def _about_metric(metric: Metric) -> list[str]:
    better = "higher" if metric.higher_is_better else "lower"
    unit = "" if metric.unit == "1" else f", in {metric.unit}"
    rows = f"; at most {metric.rows} rows" if metric.rows else ""
    return [metric.title, metric.summary, metric.paper, f"{better} is better{unit}{rows}"]


def _parameter(parameter: Parameter) -> str:
    """`name: type in [low, high] = default` and, below, what it means."""
    limits = (parameter.minimum, parameter.maximum)
    if parameter.choices:
        allowed = " | ".join(parameter.choices)
    elif limits == (None, None):
        allowed = parameter.type
    else:
        low, high = ("…" if limit is None else f"{limit:g}" for limit in limits)
        allowed = f"{parameter.type} in [{low}, {high}]"
    default = "" if parameter.default is None else f" = {json.dumps(parameter.default)}"
    meaning = f"\n  {parameter.description}" if parameter.description else ""
    return f"{parameter.name}: {allowed}{default}{meaning}"
