"""Batch times of a server and the queries of its methods: the input of the simulation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from camserve_server.engine.lanes.smaller_batches import batch_size_for
from camserve_server.models.model import LaneKind

FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Step:
    """Query of a plan.

    Attributes:
        kind: Kind of lane that runs the query.
        rows: Number of rows.
        max_per_batch: Most rows that one batch may contain; 0 for all of them.
        min_rows: Rows after which the query may be answered early; None if it needs all of them.
        released: Announced rows that the plan releases before this query.
    """

    kind: LaneKind
    rows: int
    max_per_batch: int = 0
    min_rows: int | None = None
    released: int = 0


@dataclass(frozen=True)
class MethodCost:
    """Rows that a request of a method takes.

    Attributes:
        most: Upper bound of the rows, which admission counts.
        least: Fewest rows with which the request can be answered.
        steps: Queries of the request, in order.
        plan_s: Seconds that the plan takes on the engine's thread between the batches of the whole request.
    """

    most: int
    least: int
    steps: tuple[Step, ...]
    plan_s: float = 0.0

    @property
    def can_stop_early(self) -> bool:
        """True if the request can be answered before it has used all rows."""
        return self.least < self.most


@dataclass(frozen=True)
class Profile:
    """Times of one server process.

    Attributes:
        name: Name in tables.
        source: Origin of the times.
        batch_sizes: Rows of a full batch by kind of lane.
        batch_s: Seconds of a batch by kind of lane and number of rows, padding included. It contains all sizes that
            batches can have.
        methods: Costs by name of the method.
        row_s: Seconds that each row adds to a batch, by kind of lane, for example to create masked images.
        host_s: Seconds of a request outside of the engine. One request at a time uses the host.
        equal_sizes: Smaller batch sizes that the server may use (`Model.equal_sizes`), by kind of lane.
        measured_s: Measured latency of a request on an idle server by name of the method, if known.
    """

    name: str
    source: str
    batch_sizes: Mapping[LaneKind, int]
    batch_s: Mapping[LaneKind, Mapping[int, float]]
    methods: Mapping[str, MethodCost]
    row_s: Mapping[LaneKind, float] = field(default_factory=dict)
    host_s: float = 0.0
    equal_sizes: Mapping[LaneKind, tuple[int, ...]] = field(default_factory=dict)
    measured_s: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def _batches(self) -> dict[tuple[LaneKind, int], tuple[int, float]]:
        batches = {}
        for kind, full in self.batch_sizes.items():
            for rows in range(1, full + 1):
                size = batch_size_for(self.equal_sizes.get(kind, ()), full, rows)
                batches[kind, rows] = size, self.batch_s[kind][size] + rows * self.row_s.get(kind, 0.0)
        return batches

    def batch(self, kind: LaneKind, rows: int) -> tuple[int, float]:
        """Return the size of a batch with `rows` rows of requests, padding included, and its duration in seconds."""
        return self._batches[kind, rows]

    def as_json(self) -> dict[str, Any]:
        """Return the profile as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Profile:
        """Create a profile from the values that `as_json` returned."""
        methods = {
            name: MethodCost(**{**cost, "steps": tuple(Step(**step) for step in cost["steps"])})
            for name, cost in data["methods"].items()
        }
        times = {kind: {int(size): s for size, s in by_size.items()} for kind, by_size in data["batch_s"].items()}
        equal = {kind: tuple(sizes) for kind, sizes in data.get("equal_sizes", {}).items()}
        return Profile(**{**data, "methods": methods, "batch_s": times, "equal_sizes": equal})


def load(path: Path) -> Profile:
    """Read a profile from a JSON file."""
    return Profile.from_json(json.loads(path.read_text(encoding="utf-8")))
