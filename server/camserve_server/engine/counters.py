"""Counters of the batches that an engine has run, by kind of lane."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from camserve_server.models.model import LaneKind, Model

BATCH_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class BatchRecord:
    """A batch that has run.

    Attributes:
        number: The position of the batch among all batches of the engine, from 1.
        kind: The kind of the lane.
        rows: The rows of requests.
        padding: The padding rows.
        started: The start on the clock of `time.monotonic()`.
        finished: The end on the same clock.
    """

    number: int
    kind: LaneKind
    rows: int
    padding: int
    started: float
    finished: float


@dataclass
class LaneCounters:
    """Totals of the batches of one kind of lane on one model.

    Attributes:
        rows: The rows of requests.
        padding: The padding rows.
        seconds: The summed duration of the batches.
        within: For each bound of BATCH_BOUNDS_S, the number of batches that took at most as long and longer than the
            previous bound; the last entry counts the batches that exceeded every bound.
    """

    rows: int = 0
    padding: int = 0
    seconds: float = 0.0
    within: list[int] = field(default_factory=lambda: [0] * (len(BATCH_BOUNDS_S) + 1))

    def add(self, other: LaneCounters) -> None:
        """Add the totals of another engine."""
        self.rows += other.rows
        self.padding += other.padding
        self.seconds += other.seconds
        self.within = [a + b for a, b in zip(self.within, other.within, strict=True)]


LaneKey = tuple[str, str, LaneKind]  # name of the model, precision and kind of lane


@dataclass
class Counters:
    """Totals of an engine since its start.

    Attributes:
        batches: All batches.
        rows: The rows of requests.
        padding: The padding rows.
        lanes: The totals by the model's name, the precision and the kind of lane.
    """

    batches: int = 0
    rows: int = 0
    padding: int = 0
    lanes: dict[LaneKey, LaneCounters] = field(default_factory=dict)

    def count(self, model: Model, batch: BatchRecord) -> None:
        """Add a batch of the model to the totals."""
        self.batches += 1
        self.rows += batch.rows
        self.padding += batch.padding
        lane = self.lanes.setdefault((model.name, model.precision, batch.kind), LaneCounters())
        lane.rows += batch.rows
        lane.padding += batch.padding
        lane.seconds += batch.finished - batch.started
        lane.within[bisect_left(BATCH_BOUNDS_S, batch.finished - batch.started)] += 1
