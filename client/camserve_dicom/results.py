"""Conversion of an explanation to DICOM objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from pydicom import Dataset

from camserve.answers import Explanation
from camserve.errors import CamserveError, InvalidArgument
from camserve_dicom.class_codes import ClassCode
from camserve_dicom.derivation import DEFAULT_CHECK, Derivation
from camserve_dicom.errors import DicomError
from camserve_dicom.maps import parametric_map, segmentation
from camserve_dicom.pdf_report import pdf_report, require_packages
from camserve_dicom.presentation_state import presentation_state
from camserve_dicom.reading import RenderedImage
from camserve_dicom.result_header import complete
from camserve_dicom.secondary_capture import secondary_capture
from camserve_dicom.structured_report import enhanced_report, structured_report

__all__ = ["DEFAULT_OUTPUTS", "KINDS", "derived_objects", "objects", "parse_outputs"]

DEFAULT_OUTPUTS = ("sc", "sr")
_MAKERS: dict[str, Callable[[Derivation], Dataset]] = {
    "sc": secondary_capture,
    "sr": structured_report,
    "esr": enhanced_report,
    "pm": parametric_map,
    "seg": segmentation,
    "gsps": presentation_state,
    "pdf": pdf_report,
}
# Results that are made even if the overlay is withheld. They give the reason.
_REPORTS = ("sr", "esr", "pdf")
KINDS = tuple(_MAKERS)
"""Kinds of result objects:

- "sc": the overlay as Secondary Capture Image
- "sr": the scores and the outlines of the map's highest values as Comprehensive SR, TID 1500
- "esr": the same as Enhanced SR
- "pm": the map as Parametric Map
- "seg": pixels with at least half of the map's maximum as Segmentation
- "gsps": the outline of these pixels as Grayscale or Color Softcopy Presentation State
- "pdf": a report with pictures as Encapsulated PDF; it needs `pip install 'camserve[pdf]'`
"""


def parse_outputs(outputs: Sequence[str]) -> tuple[str, ...]:
    """Return the requested kinds without duplicates, in the order of KINDS.

    Raises:
        InvalidArgument: If there is no kind or an unknown one, or a kind needs a package that is not installed.
    """
    if isinstance(outputs, str) or not outputs or (unknown := sorted(set(outputs) - set(KINDS))):
        found = repr(outputs) if isinstance(outputs, str) or not outputs else ", ".join(unknown)
        raise InvalidArgument(
            f"outputs has {found}; expected a list of one or several of {', '.join(KINDS)}", field="outputs"
        )
    if "pdf" in outputs:
        require_packages()
    return tuple(kind for kind in KINDS if kind in outputs)


def objects(
    explanation: Explanation,
    image: RenderedImage,
    outputs: Sequence[str] = DEFAULT_OUTPUTS,
    *,
    check: str | None = DEFAULT_CHECK,
    metrics: Mapping[str, Any] | None = None,
    pdf_fonts: Sequence[str | PathLike[str]] = (),
    class_codes: Sequence[ClassCode] = (),
) -> dict[str, Dataset]:
    """Make the DICOM objects of an explanation. Nothing is sent to a server.

    The same arguments give the same bytes at any time and for any request id.

    Args:
        explanation: The server's response for the pixels of `image`.
        image: The image that was explained.
        outputs: Kinds of objects, see `KINDS`.
        check: A comparison of two metrics, or of a metric and a number. If it fails, only a report is made, which
            gives the reason. None disables the check.
        metrics: The requested metrics with their parameters, which the UIDs depend on. The default is the names of the
            explanation's scores.
        pdf_fonts: TrueType or OpenType files for characters of the PDF that DejaVu Sans lacks, such as Chinese ones.
        class_codes: Codes of classes, which the reports contain instead of those of camserve.

    Returns:
        The objects by kind, in the order of KINDS, with `file_meta`.

    Raises:
        DicomError: If an object cannot be made, such as an overlay of more than 65535 rows.
        InvalidArgument: If `outputs` or `check` is invalid.
    """
    derivation = Derivation(explanation, image, check, metrics, tuple(map(Path, pdf_fonts)), tuple(class_codes))
    return derived_objects(derivation, outputs)


def derived_objects(derivation: Derivation, outputs: Sequence[str]) -> dict[str, Dataset]:
    """Make the DICOM objects of a derivation, as `objects` does."""
    kinds = parse_outputs(outputs)
    if derivation.withheld:
        kinds = tuple(kind for kind in kinds if kind in _REPORTS) or ("sr",)
    return {kind: _make_object(kind, derivation) for kind in kinds}


def _make_object(kind: str, derivation: Derivation) -> Dataset:
    """Make one object, and convert exceptions of highdicom and pydicom to DicomError."""
    try:
        return complete(_MAKERS[kind](derivation), kind, derivation)
    except (CamserveError, MemoryError):
        raise
    except Exception as error:  # an unusual header can raise any exception in highdicom and pydicom
        raise DicomError(
            f"the object of kind {kind} cannot be made: a value of the header or of the explanation does not fit into "
            "it",
            "UNWRITABLE_RESULT",
        ) from error
