"""The tables of a report, as the page takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from camserve.catalogue import Metric
from camserve_cli.report import figures, gallery, scores
from camserve_cli.report.figures import Figure
from camserve_cli.report.gallery import GalleryItem
from camserve_cli.report.records import Study
from camserve_cli.report.scores import Cell, Comparison, Mean
from camserve_cli.study import map_archive, score_csv

__all__ = ["Block", "Cost", "LayerPart", "LayerRow", "ModelPart", "blocks", "layer_parts", "model_part"]

# Columns of a table that still fit on a printed page.
_MOST_COLUMNS = 10
# Images whose maps are shown layer by layer.
_STRIPS = 4


@dataclass(frozen=True)
class Cost:
    """What a method took an image, scores included."""

    rows: float
    seconds: float
    count: int


@dataclass(frozen=True)
class ModelPart:
    """What is said of a model: the cells of its table, comparisons, curves, costs."""

    model: str
    cells: dict[tuple[str, str], Cell]
    comparisons: list[Comparison]
    curves: list[list[Figure]]
    costs: dict[str, Cost]
    cost_figures: list[Figure]


@dataclass(frozen=True)
class Block:
    """A table of methods × metrics, models side by side: as many as fit."""

    parts: Sequence[ModelPart]
    metrics: Sequence[Metric]


@dataclass(frozen=True)
class LayerRow:
    """A row of a study per layer: which layer, how large its maps are, and the means by metric."""

    layer: str
    size: str
    means: dict[str, Mean]


@dataclass(frozen=True)
class LayerPart:
    """A study per layer; `adds` says that each row has the layers of those above it, too."""

    model: str
    method: str
    adds: bool
    rows: list[LayerRow]
    figures: list[Figure]
    strip: list[GalleryItem]


def model_part(study: Study, model: str) -> ModelPart:
    """All numbers and charts of a model."""
    cells = scores.cells(study, model)
    costs = {}
    for method in study.methods:
        if records := study.of(model, method).values():
            rows, seconds = np.mean([(record.rows, record.seconds) for record in records], axis=0)
            costs[method] = Cost(float(rows), float(seconds), len(records))
    means = {
        method: {metric.name: mean for metric in study.metrics if (mean := cells[method, metric.name].mean)}
        for method in study.methods
    }
    return ModelPart(
        model=model,
        cells=cells,
        comparisons=[cell.comparison for cell in cells.values() if cell.comparison],
        curves=figures.curve_figures(study, model),
        costs=costs,
        cost_figures=figures.cost_figures(study, model, {name: cost.rows for name, cost in costs.items()}, means),
    )


def blocks(study: Study, parts: Sequence[ModelPart]) -> list[Block]:
    """All models beside each other if they fit, else a table each; metrics that do not fit go into further ones."""
    metrics = study.metrics
    together = [parts] if len(parts) * len(metrics) <= _MOST_COLUMNS else [[part] for part in parts]
    return [
        Block(group, metrics[i : i + _MOST_COLUMNS])
        for group in together
        for i in range(0, len(metrics), _MOST_COLUMNS)
    ]


def layer_parts(study: Study, maps: map_archive.MapReader) -> list[LayerPart]:
    """The studies per layer."""
    parts = []
    for model, method, labels in study.by_layer():
        known = study.models_by_name.get(model)
        sizes = {layer.name: f"{layer.height} × {layer.width}" for layer in (known.named_layers if known else ())}
        names = [score_csv.split_label(label)[1] for label in labels]
        adds = any(name.endswith("+") for name in names)
        rows = []
        for label, name in zip(labels, names, strict=True):
            layer = name.removesuffix("+")
            means = scores.means(study.of(model, label).values(), study.metrics)
            rows.append(LayerRow(layer, sizes.get(layer, ""), means))
        ticks = [f"{i}\n{row.size}" if adds else row.size for i, row in enumerate(rows, 1)]
        drawn = figures.layer_figures(
            study,
            alt=f"of {method} on {model}, by layer",
            x_label="layers, from the coarsest one; size of the finest" if adds else "layer, by the size of its maps",
            ticks=ticks,
            rows=[row.means for row in rows],
        )
        strip = gallery.layer_strips(study, model, labels, maps, _STRIPS)
        parts.append(LayerPart(model, method, adds, rows, drawn, strip))
    return parts
