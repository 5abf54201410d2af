"""Descriptions of the server and results of calls as JSON values for the page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camserve.answers import Cost, Evaluation, Explanation, Level, Prediction, Progress, Randomised, Replay
from camserve.catalogue import Method, Model
from camserve.errors import InternalError
from camserve_ui.loaded_image import base64_text

__all__ = ["event", "method", "model"]


def model(each: Model) -> dict[str, Any]:
    """Return what the page shows of a model."""
    return {
        "name": each.name,
        "state": each.state,
        "precision": each.precision,
        "device": each.device,
        "classes": each.classes,
        "labels": each.labels,
        "warnings": [*each.warnings, *(["The model has random weights."] if each.random_weights else [])],
    }


def method(each: Method) -> dict[str, Any]:
    """Return what the page shows of a method."""
    return {
        "name": each.name,
        "title": each.title,
        "summary": each.summary,
        "advice": each.advice,
        "rows": each.rows,
        "unavailable": each.unavailable,
    }


def event(each: Progress | Level | Randomised | Explanation | Evaluation | Replay) -> dict[str, Any] | None:
    """Return an event of a stream, or None if the page does not show it.

    Raises:
        InternalError: The server has sent values that no map, probability or score can have.
    """
    converted = _event(each)
    if not _is_finite(converted):
        raise InternalError("the response contains NaN or infinity; expected finite numbers")
    return converted


def _event(each: Progress | Level | Randomised | Explanation | Evaluation | Replay) -> dict[str, Any] | None:
    match each:
        case Progress():
            return {"event": "progress", "done": each.rows_done, "total": each.rows_total, "stage": each.stage}
        case Level():
            counts = {"index": each.index, "count": each.count, "layer": each.layer}
            return {"event": "level", **counts, "map": _map(each.saliency)}
        case Explanation():
            return {
                "event": "explanation",
                "map": _map(each.saliency),
                "target": _prediction(each.target),
                "predictions": [_prediction(prediction) for prediction in each.predictions],
                "cost": _cost(each.cost),
                "share": each.share,
                "warnings": each.warnings,
                "receipt": each.receipt.to_json(),
            }
        case Evaluation():
            return {
                "event": "evaluation",
                "scores": {name: {"value": float(score), "curve": score.curve} for name, score in each.scores.items()},
                "cost": _cost(each.cost),
            }
        case Replay():
            differences = [[name, _text(then), _text(now)] for name, (then, now) in each.differences.items()]
            return {"event": "replay", "same": each.same, "differences": differences}
        case _:
            return None


def _map(saliency: NDArray[np.float32]) -> dict[str, Any]:
    """Return a map [H, W] with its values as float32 in little-endian order, in base64."""
    height, width = saliency.shape
    if not (saliency.size and ((saliency >= 0) & (saliency <= 1)).all()):
        raise InternalError("the map is empty or has values outside [0, 1]")
    return {"height": height, "width": width, "values": base64_text(saliency.astype("<f4").tobytes())}


def _prediction(each: Prediction) -> dict[str, Any]:
    return {"index": each.index, "label": each.label, "probability": each.probability}


def _cost(cost: Cost) -> dict[str, Any]:
    return asdict(cost)


def _is_finite(value: object) -> bool:
    """Return False if a JSON value contains NaN or infinity, which JSON does not have."""
    match value:
        case float():
            return math.isfinite(value)
        case dict():
            return all(map(_is_finite, value.values()))
        case list() | tuple():
            return all(map(_is_finite, value))
        case _:
            return True


def _text(value: object) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
