"""CSV file with the scores of a study.

A study may be killed at any time. The rows that are finished by then are in the file, and the next run reads them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from camserve.batches import Failure, Result, Variant
from camserve.errors import CamserveError, InvalidArgument
from camserve.request_messages import BoxesLike

__all__ = ["Key", "Row", "ScoreCsv", "check_row_matches", "failure_text", "read_metrics", "row_key", "split_label"]

# Image, model, method.
Key: TypeAlias = tuple[str, str, str]
Row: TypeAlias = dict[str, str]

_BEFORE = ["image", "model", "method", "target", "label", "probability"]
_AFTER = ["rows", "queue_ms", "compute_ms", "share", "left_out", "warnings", "error", "boxes", "receipt", "curves"]
# A cell may contain several curves of 10,000 points, which exceed the default limit of the csv module.
_MAX_CELL_CHARACTERS = 2**27


def row_key(row: Mapping[str, str]) -> Key:
    """Return the image, model and method of a row."""
    return row["image"], row["model"], row["method"]


def split_label(label: str) -> tuple[str, str]:
    """Split the label of a method, METHOD or METHOD@LAYER, into METHOD and LAYER ("" if there is none)."""
    method, _, layer = label.partition("@")
    return method, layer


def read_metrics(path: Path) -> list[str]:
    """Read the metrics of a CSV file from its header line.

    Raises:
        OSError: The file cannot be read.
        InvalidArgument: The file is not a CSV file of `camserve evaluate`.
    """
    with path.open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file), [])
    metrics = columns[len(_BEFORE) : -len(_AFTER)]
    if columns != [*_BEFORE, *metrics, *_AFTER]:
        raise InvalidArgument(f"{path} is not a CSV file that `camserve evaluate --csv` wrote")
    return metrics


def failure_text(error: Failure) -> str:
    """Describe a failure in one line without the request id, so that equal failures have equal descriptions."""
    if isinstance(error, CamserveError):
        return " ".join(error.message.split())
    return f"{error.strerror}: {error.filename}" if error.strerror else str(error) or type(error).__name__


def check_row_matches(
    row: Row,
    variant: Variant,
    target: int | str | None,
    boxes: BoxesLike | None,
    *,
    precision: str | None = None,
    digest: str | None = None,
) -> None:
    """Check that an existing row was made with the same settings as this run uses.

    Args:
        row: The existing row.
        variant: The method of this run with its parameters, layers and seed.
        target: The target of this run.
        boxes: The boxes of this run.
        precision: The arithmetic of this run, if it is known.
        digest: The digest of the model's weights, if it is known.

    Raises:
        InvalidArgument: The parameters, layers, seed, target, boxes, precision or weights differ.
    """
    receipt = json.loads(row["receipt"])
    pairs: dict[str, tuple[Any, Any]] = {
        "seed": (receipt["seed"], variant.seed),
        "boxes": (row["boxes"] or "none", _boxes_to_json(boxes) or "none"),
    }
    pairs |= {name: (receipt["parameters"].get(name), value) for name, value in variant.parameters.items()}
    if variant.layers:
        pairs["layers"] = (receipt["layers"], list(variant.layers))
    if isinstance(target, int):
        pairs["target"] = (int(row["target"]), target)
    if precision:
        pairs["precision"] = (receipt["precision"], precision)
    if digest:
        pairs["weights"] = (receipt["model_digest"], digest)
    for name, (existing, current) in pairs.items():
        if existing != current:
            raise InvalidArgument(
                f"{row['image']} by {row['method']}: the existing row uses {name} {existing}; this run uses {current}; "
                "use the same settings, or choose another CSV file"
            )


class ScoreCsv:
    """CSV file of a study, with one row for each image, model and method."""

    def __init__(self, path: Path, metrics: Sequence[str]) -> None:
        """Describe the file without opening it.

        Args:
            path: The CSV file.
            metrics: Names of the metrics, in the order of their columns.
        """
        self.path = path
        self.metrics = list(metrics)
        self.columns = [*_BEFORE, *metrics, *_AFTER]

    def rows(self) -> dict[Key, Row]:
        """Read the rows.

        Returns:
            The last row of each key. The result is empty if there is no file. An incomplete last line is ignored.

        Raises:
            OSError: The file cannot be read.
            InvalidArgument: The file has other columns.
        """
        before = csv.field_size_limit(_MAX_CELL_CHARACTERS)  # of the whole process
        try:
            return self._rows()
        finally:
            csv.field_size_limit(before)

    def _rows(self) -> dict[Key, Row]:
        data = self.path.read_bytes() if self.path.exists() else b""
        complete = data[: data.rfind(b"\n") + 1].decode("utf-8", "replace")
        reader = csv.DictReader(io.StringIO(complete, newline=""))
        if reader.fieldnames is None:
            return {}
        if list(reader.fieldnames) != self.columns:
            metrics = [name for name in reader.fieldnames if name not in _BEFORE + _AFTER]
            raise InvalidArgument(
                f"{self.path} has the metrics {', '.join(metrics) or 'none'}; this run uses {', '.join(self.metrics)}; "
                "use the same metrics in the same order, or choose another file"
            )
        # A row that was cut inside a cell of several lines ends with a line break, but lacks its last cells.
        return {row_key(row): row for row in reader if row["curves"] is not None}

    def write(self, rows: Iterable[Row]) -> None:
        """Replace the file atomically. The rows are sorted by image, model and method."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows([row[name] for name in self.columns] for row in sorted(rows, key=row_key))
        temporary.replace(self.path)

    def add(self, name: str, result: Result, boxes: BoxesLike | None = None) -> None:
        """Append a row. It is in the file when this method returns.

        Args:
            name: Name of the image.
            result: The scores, or the error.
            boxes: The boxes of the image.
        """
        values = {"image": name, "model": result.model, "method": result.method, **_values(result)}
        values["boxes"] = _boxes_to_json(boxes)
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([values.get(column, "") for column in self.columns])
        # A single write, so that Ctrl-C cannot interrupt it in the middle of the line.
        with self.path.open("ab") as file:
            file.write(line.getvalue().encode())


def _boxes_to_json(boxes: BoxesLike | None) -> str:
    """Return the boxes as JSON, or an empty string if there are none."""
    return "" if boxes is None or not len(boxes) else json.dumps(np.atleast_2d(np.asarray(boxes, float)).tolist())


def _values(result: Result) -> dict[str, Any]:
    if result.error is not None:
        return {"error": failure_text(result.error)}
    curves = {name: [float(f"{y:.6g}") for y in score.curve] for name, score in result.scores.items() if score.curve}
    return {
        "target": result.target.index,
        "label": result.target.label,
        "probability": result.target.probability,
        **{metric: float(score) for metric, score in result.scores.items()},
        "rows": result.cost.rows,
        "queue_ms": result.cost.queue_ms,
        "compute_ms": result.cost.compute_ms,
        "share": result.explanation.share,
        "left_out": json.dumps([asdict(each) for each in result.explanation.left_out]),
        "warnings": "; ".join(result.warnings),
        "receipt": result.receipt.to_json(),
        "curves": json.dumps(curves),
    }
