"""The ascend lane: iterations of Adam through the network, for many variables side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from camserve_server.engine.lanes.work import Part, batch, check_differentiable, spans_of
from camserve_server.models.model import Model
from camserve_server.plan import Ascend, Ascent


class Ascending:
    """T variables, moved side by side. Row i·T + t is step i of variable t."""

    layers: tuple[str, ...] = ()

    def __init__(self, query: Ascend, model: Model) -> None:
        self._query = query
        self.least = query.min_rows
        self.rate = query.rate
        self._count = len(query.u0)
        self.rows = query.steps * self._count
        self.width = self._count
        self._u = [u.detach().clone() for u in query.u0]
        self._m = [torch.zeros_like(u) for u in self._u]
        self._v = [torch.zeros_like(u) for u in self._u]
        self._steps = [torch.zeros((), dtype=torch.float32, device=u.device) for u in self._u]
        self._history: list[list[Tensor]] = [[] for _ in self._u]
        self._halted = [False] * self._count
        self._leaves: dict[int, Tensor] = {}

    def make(self, start: int, stop: int) -> Tensor:
        """Differentiable rows: each depends on a leaf of its own."""
        rows = []
        for i in range(start, stop):
            leaf = self._leaves[i] = self._u[i % self._count].detach().clone().requires_grad_()
            rows.append(self._query.row(leaf))
        return torch.stack(rows)

    def objectives(self, start: int, logits: Tensor) -> list[Tensor]:
        """Of each row, the scalar to be maximised."""
        return [self._query.objective((start + i) % self._count, y) for i, y in enumerate(logits)]

    def leaves(self, start: int, stop: int) -> list[Tensor]:
        """Of each row, the variable to be moved."""
        return [self._leaves.pop(i) for i in range(start, stop)]

    def seen(self, row: int) -> bool:
        """Whether step `row` // T of variable `row` % T is over: it has halted, or the batch is tried again."""
        t = row % self._count
        return self._halted[t] or len(self._history[t]) > row // self._count

    def halts(self, row: int, objective: Tensor) -> bool:
        """Whether the variable is to stay where it is, now that it has had this objective."""
        halt = self._query.stop
        return halt is not None and halt([float(value) for value in (*self._history[row % self._count], objective)])

    def state(self, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The variable [K], its two moments [K], and how many steps these have had []."""
        t = row % self._count
        return self._u[t], self._m[t], self._v[t], self._steps[t]

    def note(self, row: int, objective: Tensor, halted: bool) -> None:
        """That the step is over."""
        t = row % self._count
        self._history[t].append(objective.detach())
        self._halted[t] = halted or len(self._history[t]) == self._query.steps

    def answered(self) -> bool:
        return all(self._halted)

    def answer(self) -> Ascent:
        history = tuple(tuple(float(v) for v in values) for values in self._history)
        return Ascent(torch.stack(self._u), history, tuple(self._halted))


def run_ascend(model: Model, parts: Sequence[Part], size: int) -> None:
    works: list[Ascending] = []
    for part in parts:
        assert isinstance(part.work, Ascending)
        works.append(part.work)
    with torch.enable_grad():
        X = batch(model, [part.work.make(part.start, part.stop) for part in parts], size)
        logits = model.module(X).to(model.dtype)
        check_differentiable(model, logits)
        each = zip(works, parts, spans_of(parts), strict=True)
        objectives = [o for work, part, (start, stop) in each for o in work.objectives(part.start, logits[start:stop])]
        leaves = [u for work, part in zip(works, parts, strict=True) for u in work.leaves(part.start, part.stop)]
        gradients = torch.autograd.grad(torch.stack(objectives).sum(), leaves)
    rows = [(work, row) for work, part in zip(works, parts, strict=True) for row in range(part.start, part.stop)]
    due = [(*at, y, g) for at, y, g in zip(rows, objectives, gradients, strict=True) if not at[0].seen(at[1])]
    halted = [work.halts(row, objective) for work, row, objective, _ in due]
    # Nothing before here has changed a work: a batch that fails is tried again from where it was.
    moving: dict[float, list[tuple[Tensor, ...]]] = {}
    for (work, row, _, gradient), halts in zip(due, halted, strict=True):
        if not halts:
            moving.setdefault(work.rate, []).append((gradient, *work.state(row)))
    for rate, variables in moving.items():
        step_up(rate, variables)
    for (work, row, objective, _), halts in zip(due, halted, strict=True):
        work.note(row, objective, halts)


def step_up(rate: float, variables: Sequence[Sequence[Tensor]]) -> None:
    """A step of Adam (Kingma and Ba 2015, algorithm 1) upwards, in place, in one kernel for all variables.

    Each is (gradient, variable, first moment, second moment), all [K], and steps so far, a float32 scalar.
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
