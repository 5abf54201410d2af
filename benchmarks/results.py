"""Results of the benchmarks as plain values that are stored in a JSON file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NOT_MEASURED = "not measured: "  # start of a line of output about an implementation that is not available


@dataclass(frozen=True)
class Claim:
    """Ratio of two rates of one run.

    Attributes:
        what: What was measured.
        peer: What it is compared with.
        figure: The ratio.
        aim: Target of the ratio. None if there is no target.
        unit: "×" or "share".
        agree: Agreement of the two outputs.
        because: Reason if the target is missed.
    """

    what: str
    peer: str
    figure: float
    aim: float | None
    unit: str = "×"
    agree: str = ""
    because: str = ""

    @property
    def reached(self) -> bool:
        """True if the unrounded ratio reaches the target."""
        return self.aim is None or self.figure >= self.aim


@dataclass(frozen=True)
class Table:
    """Table of the page with formatted cells. `text` is the paragraph above it."""

    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """Bar chart: group → series → value, all on one axis."""

    title: str
    unit: str
    groups: Mapping[str, Mapping[str, float]]
    logarithmic: bool = False


@dataclass(frozen=True)
class Result:
    """Result of a section.

    Attributes:
        title: Heading of the section.
        text: Paragraph below the heading.
        claims: Ratios for the summary.
        tables: Tables of the section.
        charts: Charts of the section.
        seconds: Duration of the measurements.
        command: Command that measured the section.
        made: Date and commit of the measurements.
    """

    title: str
    text: str
    claims: Sequence[Claim] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    seconds: float = 0.0
    command: str = ""
    made: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Result:
        """Create a result from the values that `as_json` returned."""
        return Result(
            **{
                **data,
                "claims": [Claim(**claim) for claim in data["claims"]],
                "tables": [Table(**table) for table in data["tables"]],
                "charts": [Chart(**chart) for chart in data["charts"]],
            }
        )


@dataclass
class Findings:
    """Claims, table rows and bars that a section collects model by model."""

    claims: list[Claim] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    bars: dict[str, dict[str, float]] = field(default_factory=dict)
