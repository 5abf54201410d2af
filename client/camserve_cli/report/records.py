"""Records of a study, read from its CSV file and ordered for a report."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camserve.catalogue import Method, Metric, Model
from camserve.errors import InvalidArgument
from camserve_cli.study import score_csv

__all__ = ["CONTROLS", "Record", "Study", "read_study"]

# Methods that explain nothing. Their scores show how well a metric detects that.
CONTROLS = ("fake-cam", "center-gaussian", "random")


@dataclass(frozen=True)
class Record:
    """Map of one image by one method on one model.

    Attributes:
        image: Name of the image.
        model: Name of the model.
        method: Label of the method.
        target: Explained class.
        probability: Probability of this class.
        scores: Scores by metric.
        curves: Curves of the scores by metric.
        rows: Number of rows, including those of the scores.
        seconds: Computation time.
        share: Share of the method's sum that the map contains, in [0, 1].
        left_out: Channels that a tolerance left out, for each layer.
        warnings: Warnings, separated by "; ".
        error: Message of the error, or "". A record with an error has no other results.
        receipt: Entries of the receipt.
    """

    image: str
    model: str
    method: str
    target: str
    probability: float
    scores: Mapping[str, float]
    curves: Mapping[str, Sequence[float]]
    rows: int
    seconds: float
    share: float
    left_out: Sequence[Mapping[str, Any]]
    warnings: str
    error: str
    receipt: Mapping[str, Any]

    @property
    def key(self) -> score_csv.Key:
        """Image, model and method."""
        return self.image, self.model, self.method


@dataclass(frozen=True)
class Study:
    """Records of a study with descriptions of its models, methods and metrics.

    Attributes:
        records: All records.
        metrics: Descriptions of the metrics.
        models: Names of the models.
        methods: Labels of the methods in the order of the report, without those of a study by layer.
        against: Label of the method with which the others are compared.
        models_by_name: Descriptions of the server's models.
        methods_by_name: Descriptions of the server's methods.
    """

    records: Sequence[Record]
    metrics: Sequence[Metric]
    models: Sequence[str]
    methods: Sequence[str]
    against: str
    models_by_name: Mapping[str, Model]
    methods_by_name: Mapping[str, Method]

    @functools.cached_property
    def _done(self) -> dict[tuple[str, str], dict[str, Record]]:
        found: dict[tuple[str, str], dict[str, Record]] = {}
        for record in self.records:
            if not record.error:
                found.setdefault((record.model, record.method), {})[record.image] = record
        return found

    @functools.cached_property
    def images(self) -> list[str]:
        """Distinct names of the images in the order of the CSV file."""
        return list(dict.fromkeys(record.image for record in self.records))

    def finished(self, model: str, method: str) -> Mapping[str, Record]:
        """Return the finished records of a method on a model, by image."""
        return self._done.get((model, method), {})

    def failed(self) -> list[Record]:
        """Return the records with errors."""
        return [record for record in self.records if record.error]

    def is_control(self, method: str) -> bool:
        """Return True if the label is that of a method that explains nothing."""
        return self.name_of(method) in CONTROLS

    def name_of(self, label: str) -> str:
        """Return the name of the method with this label."""
        return self._names.get(label, label.partition(":")[0])

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        return {record.method: record.receipt["method"] for record in self.records if not record.error}

    def by_layer(self) -> Iterator[tuple[str, str, list[str]]]:
        """Find the studies by layer.

        Yields:
            The model, the method, and the labels of the form METHOD@LAYER, the coarsest layer first.
        """
        for model in self.models:
            order = (
                [layer.name for layer in self.models_by_name[model].named_layers]
                if model in self.models_by_name
                else []
            )
            found: dict[str, list[tuple[int, str]]] = {}
            for model_of_label, label in self._done:
                method, layer = score_csv.split_label(label)
                if model_of_label == model and layer:
                    name = layer.removesuffix("+")
                    found.setdefault(method, []).append((-order.index(name) if name in order else 0, label))
            for method, labels in found.items():
                yield model, method, [label for _, label in sorted(labels)]


def read_study(
    csv: Path,
    *,
    models: Iterable[Model],
    methods: Iterable[Method],
    metrics: Iterable[Metric],
    order: Sequence[str] = (),
    against: str | None = None,
) -> Study:
    """Read a study from its CSV file.

    Args:
        csv: The CSV file.
        models: Models of the server.
        methods: Methods of the server.
        metrics: Metrics of the server.
        order: Labels of the methods that come first, in this order.
        against: Label of the method with which the others are compared. Default: the first method.

    Raises:
        OSError: The file cannot be read.
        InvalidArgument: The file has another form, names an unknown metric, or does not contain `against`.
    """
    names = score_csv.read_metrics(csv)
    metrics_by_name = {metric.name: metric for metric in metrics}
    unknown = [name for name in names if name not in metrics_by_name]
    if unknown:
        raise InvalidArgument(
            f"{csv} has the metrics {', '.join(unknown)}, which the server does not have; use the server of the study"
        )
    records = [_record(row, names) for row in score_csv.ScoreCsv(csv, names).rows().values()]
    if not records:
        raise InvalidArgument(f"{csv} contains no rows")
    labels = dict.fromkeys(record.method for record in records if not score_csv.split_label(record.method)[1])
    ordered = [label for label in dict.fromkeys([*order, *labels]) if label in labels]
    if against is not None and against not in ordered:
        raise InvalidArgument(
            f"{csv} contains no method {against!r} to compare with; its methods are: {', '.join(ordered)}",
            field="against",
        )
    return Study(
        records=records,
        metrics=[metrics_by_name[name] for name in names],
        models=list(dict.fromkeys(record.model for record in records)),
        methods=ordered,
        against=against or next(iter(ordered), ""),
        models_by_name={model.name: model for model in models},
        methods_by_name={method.name: method for method in methods},
    )


def _record(row: score_csv.Row, metrics: Sequence[str]) -> Record:
    failed = bool(row["error"])
    label = f"{row['label']} ({row['target']})" if row["label"] else f"class {row['target']}"
    return Record(
        image=row["image"],
        model=row["model"],
        method=row["method"],
        target="" if failed else label,
        probability=float(row["probability"] or 0),
        scores={} if failed else {name: float(row[name]) for name in metrics},
        curves=json.loads(row["curves"] or "{}"),
        rows=int(row["rows"] or 0),
        seconds=float(row["compute_ms"] or 0) / 1000,
        share=float(row["share"] or 1),
        left_out=json.loads(row["left_out"] or "[]"),
        warnings=row["warnings"],
        error=row["error"],
        receipt=json.loads(row["receipt"] or "{}"),
    )
