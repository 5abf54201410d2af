"""What a run left in its CSV, put in order for a report."""

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

# Methods that explain nothing: what a metric gives them says what the metric is worth.
CONTROLS = ("fake-cam", "center-gaussian", "random")


@dataclass(frozen=True)
class Record:
    """One image by one method on one model. Where there is an `error`, there is nothing else."""

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
        """What it is of."""
        return self.image, self.model, self.method


@dataclass(frozen=True)
class Study:
    """A run: its records, and what the server says of what is named in them.

    `methods` are the labels in the order of the report, without those of a study per layer; `against` is the one that
    the others are compared with.
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
        """Their names, each once, in the order of the CSV."""
        return list(dict.fromkeys(record.image for record in self.records))

    def of(self, model: str, method: str) -> Mapping[str, Record]:
        """Those that were done, by image."""
        return self._done.get((model, method), {})

    def failed(self) -> list[Record]:
        """Those that were not."""
        return [record for record in self.records if record.error]

    def is_control(self, method: str) -> bool:
        """Whether the label is of a method that explains nothing."""
        return self.name_of(method) in CONTROLS

    def name_of(self, label: str) -> str:
        """The method behind a label."""
        return self._names.get(label, label.partition(":")[0])

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        return {record.method: record.receipt["method"] for record in self.records if not record.error}

    def by_layer(self) -> Iterator[tuple[str, str, list[str]]]:
        """The studies per layer: model, method, and the labels METHOD@LAYER, the coarsest layer first."""
        for model in self.models:
            order = (
                [layer.name for layer in self.models_by_name[model].named_layers]
                if model in self.models_by_name
                else []
            )
            found: dict[str, list[tuple[int, str]]] = {}
            for of, label in self._done:
                method, layer = score_csv.split_label(label)
                if of == model and layer:
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
    """The run whose CSV is given, methods in `order` first.

    Raises OSError, and InvalidArgument for a file of another kind, an unknown metric, or no method `against` in it.
    """
    names = score_csv.read_metrics(csv)
    known = {metric.name: metric for metric in metrics}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidArgument(f"{csv} has the metrics {', '.join(unknown)}, which the server does not know")
    records = [_record(row, names) for row in score_csv.ScoreCsv(csv, names).rows().values()]
    if not records:
        raise InvalidArgument(f"there is nothing in {csv} to report")
    labels = dict.fromkeys(record.method for record in records if not score_csv.split_label(record.method)[1])
    ordered = [label for label in dict.fromkeys([*order, *labels]) if label in labels]
    if against is not None and against not in ordered:
        raise InvalidArgument(
            f"there is no method {against!r} to compare with in {csv}; there are: {', '.join(ordered)}", field="against"
        )
    return Study(
        records=records,
        metrics=[known[name] for name in names],
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
