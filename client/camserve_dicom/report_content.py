"""Values and texts that all reports of an explanation contain."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from camserve_dicom.derivation import Derivation
from camserve_dicom.overlay import WARNING

__all__ = ["content_share", "meaning", "measured_values", "notes", "parameters"]

_MEANINGS = {
    "probability": "Probability of the class",
    "saliency-in-content": "Share of saliency inside the image content",
    "share": "Share of the method's sum that was done",
    "insertion": "Insertion, area under the curve",
    "deletion": "Deletion, area under the curve",
    "average-drop": "Average drop",
    "average-increase": "Average increase",
    "average-gain": "Average gain",
}


def meaning(name: str) -> str:
    """Return the description of a value of `measured_values` for readers."""
    return _MEANINGS.get(name, name)


def measured_values(derivation: Derivation) -> list[tuple[str, float, str]]:
    """Return probability, scores and shares, each as (name, value, unit); only finite values.

    Args:
        derivation: The explanation and its image.
    """
    explanation = derivation.explanation
    values = [
        ("probability", explanation.target.probability, "1"),
        *((name, float(score), score.unit) for name, score in explanation.scores.items()),
        ("saliency-in-content", content_share(derivation), "1"),
        *([("share", explanation.share, "1")] if explanation.share < 1 else []),
    ]
    return [each for each in values if math.isfinite(each[1])]  # VR DS holds only finite numbers


def content_share(derivation: Derivation) -> float:
    """Return the share of the map's sum that lies inside the content box of the image.

    Args:
        derivation: The explanation and its image.

    Returns:
        A share in [0, 1]; 0 if the map is 0 everywhere.
    """
    saliency, image = derivation.explanation.saliency, derivation.image
    x, y = (saliency.shape[axis] / image.pixels.shape[axis] for axis in (1, 0))
    left, top, right, bottom = image.content
    inside = saliency[int(top * y) : int(np.ceil(bottom * y)), int(left * x) : int(np.ceil(right * x))]
    total = float(saliency.sum(dtype=np.float64))
    return float(inside.sum(dtype=np.float64)) / total if total else 0.0


def parameters(derivation: Derivation) -> dict[str, Any]:
    """Return the parameters of the explanation by name. Parameters that are empty are left out.

    Args:
        derivation: The explanation and its image.
    """
    receipt = derivation.explanation.receipt
    named = {
        "model": receipt.model,
        "model digest": receipt.model_digest,
        "target": f"{derivation.label} (class {derivation.explanation.target.index})",
        "layers": ", ".join(receipt.layers),
        "preprocessing": receipt.preprocessing,
        "source pixels": ", ".join(derivation.image.steps),
        "seed": receipt.seed,
        **receipt.parameters,
    }
    return {name: value for name, value in named.items() if value != ""}


def notes(derivation: Derivation) -> list[str]:
    """Return the intended use, the reason why the overlay is withheld, warnings, and a safety note.

    Args:
        derivation: The explanation and its image.
    """
    return [
        WARNING,
        *([f"The overlay is withheld. {derivation.withheld}"] if derivation.withheld else []),
        *derivation.warnings,
        "A map shows what influenced the model, not where disease is.",
    ]
