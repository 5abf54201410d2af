"""Tables of a report, in the form in which the page template uses them."""

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

# Maximum number of columns that fit on a printed page.
_MOST_COLUMNS = 10
# Number of images whose maps are shown layer by layer.
_STRIPS = 4


@dataclass(frozen=True)
class Cost:
    """Mean cost of a method for each image, including its scores.

    Attributes:
        rows: Number of rows.
        seconds: Computation time.
        count: Number of images.
    """

    rows: float
    seconds: float
    count: int


@dataclass(frozen=True)
class ModelPart:
    """Part of the report about one model.

    Attributes:
        model: Name of the model.
        cells: Cells of its table, by method and metric.
        comparisons: Comparisons of its methods.
        curves: Groups of figures with curves.
        costs: Cost of each method.
        cost_figures: Figures of scores over cost.
    """

    model: str
    cells: dict[tuple[str, str], Cell]
    comparisons: list[Comparison]
    curves: list[list[Figure]]
    costs: dict[str, Cost]
    cost_figures: list[Figure]


@dataclass(frozen=True)
class Block:
    """Table of methods by metrics, with as many models side by side as fit.

    Attributes:
        parts: The models of the table.
        metrics: The metrics of the table.
    """

    parts: Sequence[ModelPart]
    metrics: Sequence[Metric]


@dataclass(frozen=True)
class LayerRow:
    """Row of a study by layer.

    Attributes:
        layer: Name of the layer.
        size: Height and width of its maps, as text.
        means: Mean scores by metric.
    """

    layer: str
    size: str
    means: dict[str, Mean]


@dataclass(frozen=True)
class LayerPart:
    """Study of a method by layer.

    Attributes:
        model: Name of the model.
        method: Label of the method.
        adds: True if each row also uses the layers of the rows above it.
        rows: One row for each layer, the coarsest first.
        figures: Scores over the layers.
        strip: Images with a map for each layer.
    """

    model: str
    method: str
    adds: bool
    rows: list[LayerRow]
    figures: list[Figure]
    strip: list[GalleryItem]


def model_part(study: Study, model: str) -> ModelPart:
    """Compute all numbers and charts of a model."""
    cells = scores.cells(study, model)
    costs = {}
    for method in study.methods:
        if records := study.finished(model, method).values():
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
    """Divide the scores into tables that fit on a page.

    The models share a table if their columns fit, or else each model has its own. Metrics that do not fit go into
    further tables.
    """
    metrics = study.metrics
    together = [parts] if len(parts) * len(metrics) <= _MOST_COLUMNS else [[part] for part in parts]
    return [
        Block(group, metrics[i : i + _MOST_COLUMNS])
        for group in together
        for i in range(0, len(metrics), _MOST_COLUMNS)
    ]


def layer_parts(study: Study, maps: map_archive.MapReader) -> list[LayerPart]:
    """Return the studies by layer.

    Args:
        study: The study.
        maps: The saved maps.
    """
    parts = []
    for model, method, labels in study.by_layer():
        described = study.models_by_name.get(model)
        layers = described.named_layers if described else ()
        sizes = {layer.name: f"{layer.height} × {layer.width}" for layer in layers}
        names = [score_csv.split_label(label)[1] for label in labels]
        adds = any(name.endswith("+") for name in names)
        rows = []
        for label, name in zip(labels, names, strict=True):
            layer = name.removesuffix("+")
            means = scores.means(study.finished(model, label).values(), study.metrics)
            rows.append(LayerRow(layer, sizes.get(layer, ""), means))
        ticks = [f"{i}\n{row.size}" if adds else row.size for i, row in enumerate(rows, 1)]
        drawn = figures.layer_figures(
            study,
            alt=f"of {method} on {model}, by layer",
            x_label="number of layers, from the coarsest; size of the finest"
            if adds
            else "size of the maps of the layer",
            ticks=ticks,
            rows=[row.means for row in rows],
        )
        strip = gallery.layer_strips(study, model, labels, maps, _STRIPS)
        parts.append(LayerPart(model, method, adds, rows, drawn, strip))
    return parts
