"""What is measured, as plain values that a JSON file keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Claim:
    """`figure` is a ratio of two rates of one run, against the `peer`, reached if it is no less than `aim`, if any.

    `agree` says how far the outputs of the two agree. `because` is where the time goes, of one that is missed.
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
        """As it is measured, not as it is rounded."""
        return self.aim is None or self.figure >= self.aim


@dataclass(frozen=True)
class Table:
    """A table of the page, each cell as it is shown; `text` stands above it."""

    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """Groups of bars, all on one axis: group → series → value. Pictures of one section are numbered."""

    title: str
    unit: str
    groups: Mapping[str, Mapping[str, float]]
    logarithmic: bool = False


@dataclass(frozen=True)
class Result:
    """What a section has found. `seconds` is what it took; `made` says when, and of which commit."""

    title: str
    text: str
    claims: Sequence[Claim] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    seconds: float = 0.0
    command: str = ""
    made: str = ""

    def as_json(self) -> dict[str, Any]:
        """To be read by `from_json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Result:
        """What `as_json` gave."""
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
    """Claims, tables' rows and bars on the way to a result: a section adds to them model by model."""

    claims: list[Claim] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    bars: dict[str, dict[str, float]] = field(default_factory=dict)
