"""The objects that an explanation becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydicom import Dataset

from camserve.answers import Explanation
from camserve.errors import CamserveError, InvalidArgument
from camserve_dicom.derivation import DEFAULT_CHECK, Derivation
from camserve_dicom.errors import DicomError
from camserve_dicom.header import finished
from camserve_dicom.maps import parametric_map, segmentation
from camserve_dicom.presentation_state import presentation_state
from camserve_dicom.reading import RenderedImage
from camserve_dicom.secondary_capture import secondary_capture
from camserve_dicom.structured_report import structured_report

__all__ = ["DEFAULT_OUTPUTS", "KINDS", "objects", "outputs_of"]

DEFAULT_OUTPUTS = ("sc", "sr")
_MAKERS: dict[str, Callable[[Derivation], Dataset]] = {
    "sc": secondary_capture,
    "sr": structured_report,
    "pm": parametric_map,
    "seg": segmentation,
    "gsps": presentation_state,
}
KINDS = tuple(_MAKERS)


def outputs_of(given: Sequence[str]) -> tuple[str, ...]:
    """Each once, in the order of KINDS. Raises InvalidArgument for one that is not known."""
    if isinstance(given, str) or not given or (unknown := sorted(set(given) - set(KINDS))):
        named = "" if isinstance(given, str) or not given else f", not {', '.join(unknown)}"
        raise InvalidArgument(f"outputs are one or several of {', '.join(KINDS)}{named}", field="outputs")
    return tuple(kind for kind in KINDS if kind in given)


def objects(
    explanation: Explanation,
    image: RenderedImage,
    outputs: Sequence[str] = DEFAULT_OUTPUTS,
    *,
    check: str | None = DEFAULT_CHECK,
    metrics: Mapping[str, Any] | None = None,
) -> dict[str, Dataset]:
    """The DICOM objects of an explanation of that image, by kind, as they would be written to a file.

    The same arguments give the same bytes, on any day and whatever the request was called. Where the `check` fails
    there is only the report, which says so. `metrics` are those with parameters of their own, as they were asked for.

    Raises DicomError for what cannot be an object, such as an overlay of more than 65535 rows.
    """
    derivation = Derivation(explanation, image, check, metrics)
    kinds = ("sr",) if derivation.withheld else outputs_of(outputs)
    return {kind: _made(kind, derivation) for kind in kinds}


def _made(kind: str, derivation: Derivation) -> Dataset:
    try:
        return finished(_MAKERS[kind](derivation), kind, derivation)
    except (CamserveError, MemoryError):
        raise
    except Exception as error:  # whatever an odd header makes of highdicom and pydicom
        raise DicomError(
            f"no {kind} can be made: something in the header or the answer does not fit into it", "UNWRITABLE_RESULT"
        ) from error
