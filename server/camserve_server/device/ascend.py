"""The ascend lane: iterations of Adam through the network, for many variables side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from camserve_server.device.work import Part, batch, check_differentiable, spans_of
from camserve_server.models.model import Model
from camserve_server.plan import Ascend, Ascent


class Ascending:
    """Adam (Kingma and Ba 2015, algorithm 1) on T variables side by side. Row i·T + t is step i of variable t."""

    layers: tuple[str, ...] = ()
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def __init__(self, query: Ascend, model: Model) -> None:
        self._query = query
        self.least = query.least
        self._count = len(query.u0)
        self.rows = query.steps * self._count
        self.width = self._count
        self._u = [u.detach().clone() for u in query.u0]
        self._m = [torch.zeros_like(u) for u in self._u]
        self._v = [torch.zeros_like(u) for u in self._u]
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

    def move(self, row: int, objective: Tensor, gradient: Tensor) -> None:
        """Step `row` // T of variable `row` % T, unless it has halted."""
        t, step = row % self._count, row // self._count + 1
        if self._halted[t] or len(self._history[t]) >= step:  # the latter: a batch that is tried again
            return
        history = [*self._history[t], objective.detach()]
        halt = self._query.halt
        u, m, v = self._u[t], self._m[t], self._v[t]
        halted = halt is not None and halt([float(value) for value in history])
        if not halted:
            m = m.lerp(-gradient, 1 - self.beta1)
            v = (v * self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            scale = math.sqrt(1 - self.beta2**step)
            denominator = (v.sqrt() / scale).add_(self.epsilon)
            u = u.addcdiv(m, denominator, value=-self._query.rate / (1 - self.beta1**step))
        # All at once: what has failed half-way is tried again from where it was.
        self._u[t], self._m[t], self._v[t], self._history[t] = u, m, v, history
        self._halted[t] = halted or step == self._query.steps

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
    moves = [(work, row) for work, part in zip(works, parts, strict=True) for row in range(part.start, part.stop)]
    for (work, row), objective, gradient in zip(moves, objectives, gradients, strict=True):
        work.move(row, objective, gradient)
