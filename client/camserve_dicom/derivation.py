"""What every result has in common: where it comes from, what it is called, and the moment that it is of."""

from __future__ import annotations

import json
import operator
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any

from pydicom.uid import UID

from camserve.answers import Explanation
from camserve.errors import InvalidArgument
from camserve.version import __version__
from camserve_dicom.reading import RenderedImage

__all__ = ["DEFAULT_CHECK", "IMPLEMENTATION_UID", "NO_DATE", "Derivation", "check_metrics"]

DEFAULT_CHECK = "insertion>deletion"

_NAMESPACE = uuid.UUID("6f1b3c1e-5b7a-5c0e-9d3f-3f0c5a7d2e41")
_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_DATES = ("ContentDate", "AcquisitionDate", "SeriesDate", "StudyDate")
# Of 1024 characters, which descriptions have, it leaves room for the rest.
_LONGEST_LABEL = 200
# What must have a date, of an image without any, has one that nobody takes for true.
NO_DATE = datetime(1900, 1, 1)


def _uid(name: str) -> UID:
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, name).int}")


# Of all files that camserve writes.
IMPLEMENTATION_UID = _uid("implementation")


@dataclass(frozen=True, eq=False)
class Derivation:
    """An explanation of a picture, from which results are made. `metrics` is as it was asked for.

    All that is in a result follows from what is asked of which image, never from the clock, chance or the request's id.
    """

    explanation: Explanation
    image: RenderedImage
    check: str | None = None
    metrics: Mapping[str, Any] | None = None

    @cached_property
    def key(self) -> str:
        """What makes this derivation another one than others."""
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
                "versions": [receipt.versions, _versions()],
            },
            sort_keys=True,
        )

    def uid(self, name: str) -> UID:
        """The UID of that name, always the same one."""
        return _uid(f"{self.key}\n{name}")

    @cached_property
    def moment(self) -> datetime | None:
        """That of the image: results that had their own would differ each time that they are made."""
        for name in _DATES:
            date = re.sub(r"\D", "", str(self.image.source.get(name) or ""))
            time = re.sub(r"[^\d].*", "", str(self.image.source.get(name.replace("Date", "Time")) or ""))
            try:
                return datetime.strptime(date + time[:6].ljust(6, "0"), "%Y%m%d%H%M%S")
            except ValueError:
                continue
        return None

    @cached_property
    def withheld(self) -> str:
        """Why there is to be no overlay: the check that failed. Empty where it holds, or where there is none."""
        if self.check is None:
            return ""
        left, comparison, right = _parsed(self.check)
        try:
            values = [_value(side, self.explanation.scores) for side in (left, right)]
        except KeyError as error:
            raise InvalidArgument(
                f"the check needs the score {error}, which was not asked for", field="check"
            ) from None
        if _COMPARISONS[comparison](*values):
            return ""
        return (
            f"The faithfulness check {left} {comparison} {right} failed ({values[0]:.4g} and {values[1]:.4g}): "
            "the map does not show what the model relies on"
        )

    @property
    def frame_number(self) -> int | None:
        """Of the frame, from 1, as references have it; None where there is but one."""
        return self.image.frame + 1 if int(self.image.source.get("NumberOfFrames") or 1) > 1 else None

    @property
    def label(self) -> str:
        """The class, as it is shown: in a line, with nothing that means something else in DICOM, and not too long."""
        target = self.explanation.target
        given = "".join(each if each.isprintable() and each != "\\" else " " for each in target.label)
        label = " ".join(given.split())
        short = label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 3]}..."
        return short or f"class {target.index}"

    @property
    def tracked(self) -> str:
        """The finding's identifier, for people: the report's and the segment's are of the same one."""
        return f"{self.explanation.receipt.method} class {self.explanation.target.index}"[:64]

    @property
    def software(self) -> list[str]:
        """Versions of what made this, for people."""
        versions = {**self.explanation.receipt.versions, **_versions()}
        return [f"{name} {value}"[:64] for name, value in sorted(versions.items())]

    @property
    def receipt(self) -> str:
        """The receipt as JSON, but for what is by chance, and what another start of the server may change."""
        receipt = json.loads(self.explanation.receipt.to_json())
        for name in ("request_id", "batch_sizes", "device"):
            del receipt[name]
        return json.dumps(receipt, sort_keys=True)


def check_metrics(check: str | None) -> list[str]:
    """The names of the metrics that a check compares. Raises InvalidArgument for what is no check."""
    if check is None:
        return []
    left, _, right = _parsed(check)
    return [side for side in (left, right) if not _number(side)]


def _parsed(check: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*([^<>=\s]+)\s*", check)
    if not match:
        raise InvalidArgument(
            "a check compares two metrics, or one with a number, as in insertion>deletion", field="check"
        )
    return match[1], match[2], match[3]


def _number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text) is not None


def _value(side: str, scores: Mapping[str, float]) -> float:
    return float(side) if _number(side) else float(scores[side])


def _versions() -> dict[str, str]:
    """Of what makes the bytes of results."""
    libraries = ("contourpy", "highdicom", "numpy", "pillow", "pydicom")
    return {"camserve client": __version__} | {name: version(name) for name in libraries}
