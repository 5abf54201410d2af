"""Lanes of the kind "ascend": iterations of Adam through the network, for several variables at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from camserve_server.engine.lanes.batch import batch_spans, check_differentiable, padded_batch
from camserve_server.engine.lanes.lane_query import BatchSlice
from camserve_server.models.model import Model
from camserve_server.plan import Ascend, Ascent


class AscendQuery:
    """Ascent of T variables, which take their steps together. Row i·T + t is step i of variable t.

    Attributes:
        layers: Names of the layers to hook: none.
        min_rows: Number of rows after which the query may be answered early; None if it needs all of them.
        rate: Learning rate of Adam.
        rows: Number of rows in all: steps × T.
        max_per_batch: Largest number of rows that one batch may contain: T, because a step needs the one before it.
    """

    layers: tuple[str, ...] = ()

    def __init__(self, query: Ascend, model: Model) -> None:
        self._query = query
        self.min_rows = query.min_rows
        self.rate = query.rate
        self._count = len(query.u0)
        self.rows = query.steps * self._count
        self.max_per_batch = self._count
        self._u = [u.detach().clone() for u in query.u0]
        self._m = [torch.zeros_like(u) for u in self._u]
        self._v = [torch.zeros_like(u) for u in self._u]
        self._steps = [torch.zeros((), dtype=torch.float32, device=u.device) for u in self._u]
        self._history: list[list[Tensor]] = [[] for _ in self._u]
        self._ended = [False] * self._count
        self._leaves: dict[int, Tensor] = {}

    def make(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop), [stop − start, C, H, W]; each depends on its own copy of a variable."""
        rows = []
        for i in range(start, stop):
            leaf = self._leaves[i] = self._u[i % self._count].detach().clone().requires_grad_()
            rows.append(self._query.row(leaf))
        return torch.stack(rows)

    def objectives(self, start: int, logits: Tensor) -> list[Tensor]:
        """Return the scalar to maximise for each row.

        Args:
            start: Index of the first row.
            logits: Logits [n, classes] of the n rows from `start` on.
        """
        return [self._query.objective((start + i) % self._count, y) for i, y in enumerate(logits)]

    def take_leaves(self, start: int, stop: int) -> list[Tensor]:
        """Return the copies of the variables that rows [start, stop) depend on, and forget them."""
        return [self._leaves.pop(i) for i in range(start, stop)]

    def is_step_done(self, row: int) -> bool:
        """Return True if the row needs no update.

        Either its variable has ended, or the update has been made and the batch is run again.
        """
        t = row % self._count
        return self._ended[t] or len(self._history[t]) > row // self._count

    def is_stopped(self, row: int, objective: Tensor) -> bool:
        """Return True if the query's `stop` callback ends the ascent of the row's variable at this objective."""
        stop = self._query.stop
        return stop is not None and stop([float(value) for value in (*self._history[row % self._count], objective)])

    def adam_state(self, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the row's variable [K], its first and second moment [K], and its number of updates [], a float32."""
        t = row % self._count
        return self._u[t], self._m[t], self._v[t], self._steps[t]

    def record_step(self, row: int, objective: Tensor, stopped: bool) -> None:
        """Record that the step of the row is over; `stopped` ends the ascent of its variable."""
        t = row % self._count
        self._history[t].append(objective.detach())
        self._ended[t] = stopped or len(self._history[t]) == self._query.steps

    def is_complete(self) -> bool:
        """Return True if the ascent of every variable has ended."""
        return all(self._ended)

    def answer(self) -> Ascent:
        """Return the variables [T, K], their objectives before each update, and which ascents have ended."""
        history = tuple(tuple(float(v) for v in values) for values in self._history)
        return Ascent(torch.stack(self._u), history, tuple(self._ended))


def run_ascend(model: Model, slices: Sequence[BatchSlice], size: int) -> None:
    """Run one batch of a lane of the kind "ascend": a forward pass, a backward pass and an update of Adam for each row.

    Args:
        model: Network to run.
        slices: Rows of one or more queries.
        size: Number of rows of the batch; padding rows fill it up.

    Raises:
        Unservable: No gradient of the logits reaches the input.
    """
    queries: list[AscendQuery] = []
    for each in slices:
        assert isinstance(each.query, AscendQuery)
        queries.append(each.query)
    with torch.enable_grad():
        X = padded_batch(model, [each.query.make(each.start, each.stop) for each in slices], size)
        logits = model.module(X).to(model.dtype)
        check_differentiable(model, logits.requires_grad)
        placed = zip(queries, slices, batch_spans(slices), strict=True)
        objectives = [
            o for query, each, (start, stop) in placed for o in query.objectives(each.start, logits[start:stop])
        ]
        leaves = [
            u for query, each in zip(queries, slices, strict=True) for u in query.take_leaves(each.start, each.stop)
        ]
        gradients = torch.autograd.grad(torch.stack(objectives).sum(), leaves)
    rows = [(query, row) for query, each in zip(queries, slices, strict=True) for row in range(each.start, each.stop)]
    due = [
        (query, row, y, g)
        for (query, row), y, g in zip(rows, objectives, gradients, strict=True)
        if not query.is_step_done(row)
    ]
    stopped = [query.is_stopped(row, objective) for query, row, objective, _ in due]
    # No query has changed up to here: a batch that fails before this line is run again from the same state.
    moving: dict[float, list[tuple[Tensor, ...]]] = {}
    for (query, row, _, gradient), stops in zip(due, stopped, strict=True):
        if not stops:
            moving.setdefault(query.rate, []).append((gradient, *query.adam_state(row)))
    for rate, variables in moving.items():
        adam_ascent_step(rate, variables)
    for (query, row, objective, _), stops in zip(due, stopped, strict=True):
        query.record_step(row, objective, stops)


def adam_ascent_step(rate: float, variables: Sequence[Sequence[Tensor]]) -> None:
    """Make one step of Adam upwards, in place, in one kernel for all variables.

    The update is algorithm 1 of Kingma and Ba, 2015 (arXiv:1412.6980), with β₁ = 0.9, β₂ = 0.999 and ε = 1e-8.

    Args:
        rate: Learning rate.
        variables: For each variable its gradient, value, first moment and second moment, all [K], and its number of
            updates so far, a float32 scalar.
    """
    gradients, us, ms, vs, steps = ([*values] for values in zip(*variables, strict=True))
    adam(
        us,
        gradients,
        ms,
        vs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=rate,
        weight_decay=0.0,
        eps=1e-8,
        maximize=True,
    )
