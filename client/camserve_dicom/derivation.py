"""Properties that all results of an explanation share: UIDs, date, label and faithfulness check."""

from __future__ import annotations

import json
import operator
import re
import uuid
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydicom.uid import UID

from camserve.answers import Explanation
from camserve.errors import InvalidArgument
from camserve.version import __version__
from camserve_dicom.class_codes import ClassCode, find_code
from camserve_dicom.contrast import is_constant, saturation_warnings
from camserve_dicom.reading import RenderedImage

__all__ = [
    "DEFAULT_CHECK",
    "IMPLEMENTATION_UID",
    "NO_DATE",
    "Derivation",
    "check_metrics",
    "derived_uid",
    "library_versions",
]

DEFAULT_CHECK = "insertion>deletion"

_NAMESPACE = uuid.UUID("6f1b3c1e-5b7a-5c0e-9d3f-3f0c5a7d2e41")
_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_DATES = ("ContentDate", "AcquisitionDate", "SeriesDate", "StudyDate")
# Derivation Description holds 1024 characters. This limit leaves room for the rest of the text.
_MAX_LABEL_LENGTH = 200
# Validators refuse dates of earlier years, which come from de-identification. strftime writes them with fewer digits.
_MIN_YEAR = 1000
# The beginning of the server's warning about an image with little contrast.
_CONSTANT = "nearly constant image"
# The date of attributes that must not be empty, if the image has no date. It is recognisable as a placeholder.
NO_DATE = datetime(1900, 1, 1)


def derived_uid(name: str) -> UID:
    """Return a UID that depends only on a text."""
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, name).int}")


IMPLEMENTATION_UID = derived_uid("implementation")
"""Implementation Class UID of all files that camserve writes (PS3.10 7.1)."""


@dataclass(frozen=True, eq=False)
class Derivation:
    """An explanation of a rendered image, from which results are made.

    The content of results depends only on the image and the request. It does not depend on the time, on random numbers
    or on the request id, so the same request gives the same bytes.

    Attributes:
        explanation: The server's response.
        image: The image that was explained.
        check: The faithfulness check, such as "insertion>deletion", or None.
        metrics: The requested metrics with their parameters, if any metric has parameters.
        pdf_fonts: Further font files of the PDF report.
        class_codes: Codes of classes.
    """

    explanation: Explanation
    image: RenderedImage
    check: str | None = None
    metrics: Mapping[str, Any] | None = None
    pdf_fonts: tuple[Path, ...] = ()
    class_codes: tuple[ClassCode, ...] = ()

    @cached_property
    def key(self) -> str:
        """A JSON text that identifies the image and the request. All UIDs are derived from it."""
        receipt, source = self.explanation.receipt, self.image.source
        return json.dumps(
            {
                "source": str(source.SOPInstanceUID),
                "frame": self.image.frame,
                "model": [receipt.model, receipt.model_digest, receipt.precision],
                "method": [receipt.method, receipt.parameters, receipt.layers, receipt.seed, receipt.budget],
                "target": [self.explanation.target.index, self.explanation.target.label],
                "preprocessing": [receipt.preprocessing, self.image.steps, self.image.box],
                "metrics": self.metrics or sorted(self.explanation.scores),
                "check": self.check,
                "versions": [receipt.versions, library_versions()],
                **({"code": astuple(self.code)} if self.code else {}),
            },
            sort_keys=True,
        )

    def uid(self, name: str) -> UID:
        """Return a UID that depends only on `key` and the name."""
        return derived_uid(f"{self.key}\n{name}")

    @cached_property
    def image_datetime(self) -> datetime | None:
        """Date and time of the image, or None. Results use it, because the current time would change their bytes."""
        for name in _DATES:
            date = re.sub(r"\D", "", str(self.image.source.get(name) or ""))
            time = re.sub(r"[^\d].*", "", str(self.image.source.get(name.replace("Date", "Time")) or ""))
            try:
                found = datetime.strptime(date + time[:6].ljust(6, "0"), "%Y%m%d%H%M%S")
            except ValueError:
                continue
            if found.year >= _MIN_YEAR:
                return found
        return None

    @cached_property
    def withheld(self) -> str:
        """The reason why only a report is made: a constant image, or the check that failed; otherwise empty."""
        if is_constant(self.image.pixels):
            return (
                "The image is constant: all pixels that the model got have the same value, so there is nothing that a "
                "map could show; check its window and the number of the frame"
            )
        if self.check is None:
            return ""
        left, comparison, right = _parse_check(self.check)
        try:
            values = [_value(side, self.explanation.scores) for side in (left, right)]
        except KeyError as error:
            raise InvalidArgument(
                f"the check needs the score {error}, which was not requested; add the metric", field="check"
            ) from None
        if _COMPARISONS[comparison](*values):
            return ""
        return (
            f"The faithfulness check {left} {comparison} {right} failed ({values[0]:.4g} and {values[1]:.4g}): "
            "the map does not show what the model relies on"
        )

    @cached_property
    def image_warnings(self) -> tuple[str, ...]:
        """Warnings about the pixels that the model got, among them those of the server."""
        constant = [each for each in self.explanation.warnings if each.startswith(_CONSTANT)]
        return (*saturation_warnings(self.image.pixels), *constant)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the pixels, and further ones of the server."""
        return tuple(dict.fromkeys([*self.image_warnings, *self.explanation.warnings]))

    @property
    def frame_number(self) -> int | None:
        """Referenced Frame Number, counted from 1, or None for a single-frame image."""
        return self.image.frame + 1 if int(self.image.source.get("NumberOfFrames") or 1) > 1 else None

    @property
    def code(self) -> ClassCode | None:
        """The code of the class, or None if the site provides none."""
        return find_code(self.class_codes, self.explanation.target, self.explanation.receipt.model)

    @property
    def label(self) -> str:
        """The class label for display: one line of at most 200 printable characters without backslashes."""
        target = self.explanation.target
        printable = "".join(each if each.isprintable() and each != "\\" else " " for each in target.label)
        label = " ".join(printable.split())
        short = label if len(label) <= _MAX_LABEL_LENGTH else f"{label[: _MAX_LABEL_LENGTH - 3]}..."
        return short or f"class {target.index}"

    @property
    def tracking_id(self) -> str:
        """Tracking ID of the finding, which the report and the segmentation share."""
        return f"{self.explanation.receipt.method} class {self.explanation.target.index}"[:64]

    @property
    def software_versions(self) -> list[str]:
        """Values of Software Versions: the packages of the server and the client with their versions."""
        versions = {**self.explanation.receipt.versions, **library_versions()}
        return [f"{name} {value}"[:64] for name, value in sorted(versions.items())]

    @property
    def receipt_json(self) -> str:
        """The receipt as JSON, without the request id, and without batch sizes and device, which servers choose."""
        receipt = json.loads(self.explanation.receipt.to_json())
        for name in ("request_id", "batch_sizes", "device", "device_name"):
            receipt.pop(name, None)
        return json.dumps(receipt, sort_keys=True)


def check_metrics(check: str | None) -> list[str]:
    """Return the names of the metrics that a check compares.

    Args:
        check: A comparison of two metrics, or of a metric and a number, such as "insertion>deletion"; None for none.

    Raises:
        InvalidArgument: If the check is not a comparison.
    """
    if check is None:
        return []
    left, _, right = _parse_check(check)
    return [side for side in (left, right) if not _is_number(side)]


def _parse_check(check: str) -> tuple[str, str, str]:
    """Return the left side, the comparison operator and the right side of a check."""
    match = re.fullmatch(r"\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*([^<>=\s]+)\s*", check)
    if not match:
        raise InvalidArgument(
            f"check is {check!r}; expected a comparison of two metrics, or of a metric and a number, such as "
            "insertion>deletion",
            field="check",
        )
    return match[1], match[2], match[3]


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text) is not None


def _value(side: str, scores: Mapping[str, float]) -> float:
    return float(side) if _is_number(side) else float(scores[side])


def library_versions() -> dict[str, str]:
    """Return the versions of the packages that determine the bytes of results."""
    libraries = ("contourpy", "highdicom", "numpy", "pillow", "pydicom")
    return {"camserve client": __version__} | {name: version(name) for name in libraries}
