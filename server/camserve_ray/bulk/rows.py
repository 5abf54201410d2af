"""The rows of the output: one for each image, model and method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow
from numpy.typing import NDArray

from camserve.answers import Explanation
from camserve_ray.bulk.files import escaped
from camserve_ray.bulk.inputs import BulkImage

__all__ = ["Key", "Row", "failed_row", "key", "requested", "row", "schema"]

# Image, model, method.
Key: TypeAlias = tuple[str, str, str]


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the output and its map.

    Attributes:
        values: The values by the names of the columns.
        saliency: The map, float32 [H, W] in [0, 1]. None for a failed image, and if maps are
            not saved.
        reason: The kind of the error, such as "UNREADABLE_IMAGE"; empty without an error.
    """

    values: Mapping[str, Any]
    saliency: NDArray[np.float32] | None = field(default=None, repr=False)
    reason: str = ""


def schema(metrics: Sequence[str]) -> pyarrow.Schema:
    """Return the columns of the Parquet files.

    They are those of the CSV file of `camserve evaluate`, the target that the run asked for, and two columns that say
    where the map is.

    Args:
        metrics: Names of the metrics.
    """
    text, number, integer = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    return pyarrow.schema(
        [
            *((name, text) for name in ("image", "model", "method")),
            ("target", integer),
            ("label", text),
            ("probability", number),
            *((name, number) for name in metrics),
            ("rows", integer),
            ("queue_ms", number),
            ("compute_ms", number),
            ("share", number),
            *((name, text) for name in ("left_out", "warnings", "error", "boxes", "receipt", "curves")),
            *((name, text) for name in ("requested_target", "map_file", "map_name")),
        ]
    )


def key(values: Mapping[str, Any]) -> Key:
    """Return the image, model and method of a row."""
    return values["image"], values["model"], values["method"]


def row(of: Key, explanation: Explanation, image: BulkImage, *, with_map: bool) -> Row:
    """Return the row of an explanation.

    Args:
        of: Image, model and method.
        explanation: The explanation with its scores.
        image: The image.
        with_map: Keep the map.
    """
    cost = explanation.cost
    curves = {
        name: [float(f"{y:.6g}") for y in score.curve] for name, score in explanation.scores.items() if score.curve
    }
    values = {
        **_named(of, image),
        "target": explanation.target.index,
        "label": explanation.target.label,
        "probability": explanation.target.probability,
        **{metric: float(score) for metric, score in explanation.scores.items()},
        "rows": cost.rows,
        "queue_ms": cost.queue_ms,
        "compute_ms": cost.compute_ms,
        "share": explanation.share,
        "left_out": json.dumps([asdict(each) for each in explanation.left_out]),
        "warnings": "; ".join(explanation.warnings),
        "error": "",
        "receipt": explanation.receipt.to_json(),
        "curves": json.dumps(curves),
    }
    return Row(values, explanation.saliency if with_map else None)


def failed_row(of: Key, error: str, reason: str, image: BulkImage) -> Row:
    """Return the row of a failed image.

    Args:
        of: Image, model and method.
        error: The error in one line. It may contain the undecodable bytes of a file name.
        reason: The kind of the error.
        image: The image.
    """
    return Row({**_named(of, image), "error": escaped(error)}, reason=reason)


def requested(image: BulkImage) -> tuple[str, str]:
    """Return the target and the boxes of an image as texts: the class index or label, and JSON.

    The target is empty for the predicted class, and the boxes are empty if there are none.
    """
    target = "" if image.target is None else escaped(str(image.target))
    return target, json.dumps(np.atleast_2d(np.asarray(image.boxes, float)).tolist()) if image.boxes else ""


def _named(of: Key, image: BulkImage) -> dict[str, str]:
    target, boxes = requested(image)
    return {**dict(zip(("image", "model", "method"), of, strict=True)), "requested_target": target, "boxes": boxes}
