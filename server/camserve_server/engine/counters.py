"""Counters of the batches that an engine has run, by lane."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from camserve_server.models.model import LaneKind, Model

BATCH_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Ran:
    """A batch that was run: the engine's `number` of it, its rows, those of nothing, and its times of `monotonic()`."""

    number: int
    kind: LaneKind
    rows: int
    padding: int
    started: float
    finished: float


@dataclass
class LaneCounters:
    """The batches of one lane: rows, rows of nothing, seconds, and how many took up to each of BATCH_BOUNDS_S."""

    rows: int = 0
    padding: int = 0
    seconds: float = 0.0
    within: list[int] = field(default_factory=lambda: [0] * (len(BATCH_BOUNDS_S) + 1))  # the last: longer than all


@dataclass
class Counters:
    """What the engine has done since it started; `lanes` by model, precision and kind."""

    batches: int = 0
    rows: int = 0
    padding: int = 0
    lanes: dict[tuple[str, str, LaneKind], LaneCounters] = field(default_factory=dict)

    def count(self, model: Model, ran: Ran) -> None:
        """Adds a batch of the model."""
        self.batches += 1
        self.rows += ran.rows
        self.padding += ran.padding
        lane = self.lanes.setdefault((model.name, model.precision, ran.kind), LaneCounters())
        lane.rows += ran.rows
        lane.padding += ran.padding
        lane.seconds += ran.finished - ran.started
        lane.within[bisect_left(BATCH_BOUNDS_S, ran.finished - ran.started)] += 1
