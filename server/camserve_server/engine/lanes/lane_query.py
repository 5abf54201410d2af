"""Queries in progress, their slices in a batch, and sums over their rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from camserve_server.models.model import PASSES, LaneKind, Passes
from camserve_server.plan import Sum, Sums


@dataclass(frozen=True)
class Lane:
    """Key that decides which queries can share a batch.

    Queries of one lane run on the same network, with the same passes and the same batch size.

    Attributes:
        model: Lane key of the model (`Model.lane_key`).
        kind: Kind of passes: forward, gradient or ascend. Queries with few rows have small lanes (`SMALL_KINDS`).
        size: Number of rows of a full batch.
        layers: Layers to differentiate. Empty unless `passes` is "gradient".
        copy: Job id of the request that owns the random copy of the model; 0 for the served model.
        fast_forward: True if the batches use `Model.fast_forward`. Only queries without hooks do. They have a lane of
            their own, so that the bits of a row do not depend on the queries that share its batch.
        ascent: Properties that ascents must share to be in one batch (`AscendQuery.lane_key`). None unless `kind` is
            "ascend".
    """

    model: str
    kind: LaneKind
    size: int
    layers: tuple[str, ...] = ()
    copy: int = 0
    fast_forward: bool = False
    ascent: Hashable = None

    @property
    def passes(self) -> Passes:
        """Passes of the network for each row."""
        return PASSES[self.kind]


class LaneQuery(Protocol):
    """Query of a plan in progress: it collects the results of its rows and gives the plan its answer."""

    @property
    def rows(self) -> int:
        """Number of rows in all."""
        ...

    @property
    def max_per_batch(self) -> int:
        """Largest number of rows that one batch may contain."""
        ...

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers to hook."""
        ...

    @property
    def min_rows(self) -> int | None:
        """Number of rows after which the query may be answered early; None if it needs all of them."""
        ...

    def is_complete(self) -> bool:
        """Return True if no further row is needed."""
        ...

    def answer(self) -> Any:
        """Return the answer for the plan, made from the rows that have run."""
        ...


@dataclass
class BatchSlice:
    """Rows [start, stop) of a query, which run in one batch."""

    query: LaneQuery
    start: int
    stop: int


class RowSum:
    """Sums of a term over the rows of a query, one sum for each group (`plan.Sum`).

    Rows are added one by one in their order, so the bits of the sum do not depend on the batches. A row that is in the
    sum is not added again, because a batch that failed half-way is run a second time.
    """

    def __init__(self, query: Sum[Any]) -> None:
        self._term = query.term
        self._totals: list[Tensor | None] = [None] * query.groups
        self._counts = [0] * query.groups

    def add(self, start: int, answers: Sequence[object]) -> None:
        """Add the terms of consecutive rows.

        Args:
            start: Index of the first row.
            answers: Answer of each row alone, with a leading dimension of 1.
        """
        for i, answer in enumerate(answers, start):
            if i < sum(self._counts):
                continue
            group = i % len(self._totals)
            term, total = self._term(i, answer), self._totals[group]
            self._totals[group] = term.clone() if total is None else total.add_(term)
            self._counts[group] += 1

    def answer(self) -> Sums:
        """Return the sums [G, …] and the number of rows [G] in each, for the groups that have at least one row."""
        totals = [total for total in self._totals if total is not None]
        return Sums(torch.stack(totals), torch.tensor(self._counts, device=totals[0].device))
