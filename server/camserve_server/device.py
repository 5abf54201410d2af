"""Runs one batch: makes its rows, pads it, hooks the layers, goes forward and, where asked, backward.

On a CPU, only the engine's thread may do arithmetic on tensors of any size. A second thread would get an OpenMP team of
its own, and with more threads than cores libgomp's waits go to sleep: a third of the speed is lost, for good.

A *work* is a question under way. It belongs to a lane: works of one lane can share a batch. Each lane runs one fixed
batch size, the last rows being padding, so that the arithmetic of a row does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import Ascend, Ascent, Capture, Gradient, Gradients, Predict, Query, Score, Scores


@dataclass(frozen=True)
class Lane:
    """Works of one lane share batches: the same model, the same passes, the same layers to differentiate."""

    model: str
    kind: LaneKind
    layers: tuple[str, ...] = ()


class Work(Protocol):
    """A question under way: `rows` in all, at most `width` in one batch; `layers` to be hooked."""

    @property
    def rows(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> tuple[str, ...]: ...

    def make(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the model's input."""
        ...

    def answered(self) -> bool:
        """Whether no further row is needed."""
        ...

    def answer(self) -> Any:
        """What the plan gets."""
        ...


@dataclass
class Part:
    """Rows [start, stop) of a work, to be run in a batch."""

    work: Work
    start: int
    stop: int


# ---- the forward lane ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Forward:
    """What forward works share: they are handed their rows' logits and activations."""

    model: Model
    rows: int = 1
    layers: tuple[str, ...] = ()
    done: int = 0

    @property
    def width(self) -> int:
        return self.rows

    def make(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError

    def answer(self) -> Any:
        raise NotImplementedError

    def answered(self) -> bool:
        return self.done == self.rows

    def take(self, start: int, stop: int, logits: Tensor, activations: dict[str, Tensor]) -> None:
        self.done = stop
        self.keep(start, stop, logits, activations)

    def keep(self, start: int, stop: int, logits: Tensor, activations: dict[str, Tensor]) -> None:
        raise NotImplementedError


class _Predicting(_Forward):
    def __init__(self, query: Predict, model: Model) -> None:
        super().__init__(model)
        self._x = query.x

    def make(self, start: int, stop: int) -> Tensor:
        return self._x.tensor[None]

    def keep(self, start: int, stop: int, logits: Tensor, activations: dict[str, Tensor]) -> None:
        self._logits = logits[0].double()

    def answer(self) -> Tensor:
        return self._logits


class _Capturing(_Forward):
    def __init__(self, query: Capture, model: Model) -> None:
        super().__init__(model, layers=tuple(query.layers))
        self._x = query.x

    def make(self, start: int, stop: int) -> Tensor:
        return self._x.tensor[None]

    def keep(self, start: int, stop: int, logits: Tensor, activations: dict[str, Tensor]) -> None:
        self._activations = tuple(activations[layer][0] for layer in self.layers)

    def answer(self) -> tuple[Tensor, ...]:
        return self._activations


class _Scoring(_Forward):
    def __init__(self, query: Score, model: Model) -> None:
        super().__init__(model, rows=len(query.rows))
        self._rows = query.rows
        self._index = torch.tensor(query.c.index, device=model.device)
        size = (self.rows, len(query.c))
        self._logits = torch.empty(size, dtype=torch.float64, device=model.device)
        self._probabilities = torch.empty_like(self._logits)

    def make(self, start: int, stop: int) -> Tensor:
        return self._rows.make(start, stop)

    def keep(self, start: int, stop: int, logits: Tensor, activations: dict[str, Tensor]) -> None:
        self._logits[start:stop] = logits[:, self._index].double()
        self._probabilities[start:stop] = self.model.probabilities(logits)[:, self._index]

    def answer(self) -> Scores:
        return Scores(self._logits, self._probabilities)


def _run_forward(model: Model, parts: Sequence[Part], size: int) -> None:
    layers = tuple(dict.fromkeys(layer for part in parts for layer in part.work.layers))
    X = _batch(model, [part.work.make(part.start, part.stop) for part in parts], size)
    # The slices of those who asked are copied at once: a later module may work in place on what was captured.
    wanted = {layer: [layer in part.work.layers for part in parts] for layer in layers}
    spans = _spans(parts)
    captured: list[dict[str, Tensor]] = [{} for _ in parts]

    def capture(layer: str, output: Tensor) -> None:
        for i, (start, stop) in enumerate(spans):
            if wanted[layer][i]:
                captured[i][layer] = output[start:stop].clone(memory_format=torch.contiguous_format)

    with _hooks(model.module, layers, capture):
        logits = model.module(X)
    for part, (start, stop), activations in zip(parts, spans, captured, strict=True):
        assert isinstance(part.work, _Forward)
        part.work.take(part.start, part.stop, logits[start:stop], activations)


# ---- the gradient lane -----------------------------------------------------------------------------------------------


class _Differentiating:
    """Gathers activations and gradients of the layers, row by row."""

    def __init__(self, query: Gradient, model: Model) -> None:
        self.rows = self.width = len(query.rows)
        self.layers = tuple(query.layers)
        self.index = tuple(query.index)
        self._rows = query.rows
        self._activations: list[list[Tensor]] = [[] for _ in self.layers]
        self._gradients: list[list[Tensor]] = [[] for _ in self.layers]
        self._done = 0

    def make(self, start: int, stop: int) -> Tensor:
        return self._rows.make(start, stop)

    def take(self, stop: int, activations: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        if stop <= self._done:  # a batch that is tried again, part by part
            return
        self._done = stop
        for i, (activation, gradient) in enumerate(zip(activations, gradients, strict=True)):
            self._activations[i].append(activation.detach().clone(memory_format=torch.contiguous_format))
            self._gradients[i].append(gradient.clone(memory_format=torch.contiguous_format))

    def answered(self) -> bool:
        return self._done == self.rows

    def answer(self) -> Gradients:
        return Gradients(
            tuple(torch.cat(chunks) for chunks in self._activations),
            tuple(torch.cat(chunks) for chunks in self._gradients),
        )


def _run_gradient(model: Model, parts: Sequence[Part], size: int) -> None:
    layers = parts[0].work.layers
    X = _batch(model, [part.work.make(part.start, part.stop) for part in parts], size)
    outputs: dict[str, Tensor] = {}

    def capture(layer: str, output: Tensor) -> Tensor:
        # The graph begins at the first layer that is asked for: nothing before it is kept for a backward pass. What
        # goes on is a copy, so that a later module that works in place leaves the activation alone.
        kept = output if output.requires_grad else output.detach().requires_grad_()
        outputs[layer] = kept
        return kept.clone()

    with torch.enable_grad(), _hooks(model.module, layers, capture):
        logits = model.module(X)
        spans = _spans(parts)
        chosen = logits.new_zeros(())
        for part, (start, stop) in zip(parts, spans, strict=True):
            assert isinstance(part.work, _Differentiating)
            index = torch.tensor(part.work.index[part.start : part.stop], device=logits.device)
            chosen = chosen + logits[start:stop].gather(1, index[:, None]).sum()
        gradients = torch.autograd.grad(chosen, [outputs[layer] for layer in layers])
    for part, (start, stop) in zip(parts, spans, strict=True):
        assert isinstance(part.work, _Differentiating)
        part.work.take(part.stop, [outputs[layer][start:stop] for layer in layers], [g[start:stop] for g in gradients])


# ---- the ascend lane -------------------------------------------------------------------------------------------------


class _Ascending:
    """Adam (Kingma and Ba 2015, algorithm 1) on T variables side by side. Row i·T + t is step i of variable t."""

    layers: tuple[str, ...] = ()
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def __init__(self, query: Ascend, model: Model) -> None:
        self._query = query
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
        self._history[t].append(objective.detach())
        halt = self._query.halt
        if halt is not None and halt([float(value) for value in self._history[t]]):
            self._halted[t] = True
        else:
            self._m[t].lerp_(-gradient, 1 - self.beta1)
            self._v[t].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            scale = math.sqrt(1 - self.beta2**step)
            denominator = (self._v[t].sqrt() / scale).add_(self.epsilon)
            self._u[t].addcdiv_(self._m[t], denominator, value=-self._query.rate / (1 - self.beta1**step))
            self._halted[t] = step == self._query.steps

    def answered(self) -> bool:
        return all(self._halted)

    def answer(self) -> Ascent:
        return Ascent(torch.stack(self._u), tuple(tuple(float(v) for v in values) for values in self._history))


def _run_ascend(model: Model, parts: Sequence[Part], size: int) -> None:
    works: list[_Ascending] = []
    for part in parts:
        assert isinstance(part.work, _Ascending)
        works.append(part.work)
    with torch.enable_grad():
        X = _batch(model, [part.work.make(part.start, part.stop) for part in parts], size)
        logits = model.module(X)
        spans = zip(works, parts, _spans(parts), strict=True)
        objectives = [o for work, part, (start, stop) in spans for o in work.objectives(part.start, logits[start:stop])]
        leaves = [u for work, part in zip(works, parts, strict=True) for u in work.leaves(part.start, part.stop)]
        gradients = torch.autograd.grad(torch.stack(objectives).sum(), leaves)
    moves = [(work, row) for work, part in zip(works, parts, strict=True) for row in range(part.start, part.stop)]
    for (work, row), objective, gradient in zip(moves, objectives, gradients, strict=True):
        work.move(row, objective, gradient)


# ---- what all lanes share --------------------------------------------------------------------------------------------


def start_work(query: Query[Any], model: Model) -> tuple[Lane, Work]:
    """The lane that answers the query, and the work that it means."""
    match query:
        case Predict():
            return Lane(model.name, "forward"), _Predicting(query, model)
        case Capture():
            return Lane(model.name, "forward"), _Capturing(query, model)
        case Score():
            return Lane(model.name, "forward"), _Scoring(query, model)
        case Gradient():
            return Lane(model.name, "gradient", tuple(query.layers)), _Differentiating(query, model)
        case Ascend():
            return Lane(model.name, "ascend"), _Ascending(query, model)
        case _:
            raise TypeError(f"the engine does not know the query {type(query).__name__}")


_RUN: dict[LaneKind, Callable[[Model, Sequence[Part], int], None]] = {
    "forward": _run_forward,
    "gradient": _run_gradient,
    "ascend": _run_ascend,
}


def run(model: Model, lane: Lane, parts: Sequence[Part], size: int) -> None:
    """Runs the parts as one batch of `size` rows, the last of them padding. Each work has its rows' share after."""
    _RUN[lane.kind](model, parts, size)


def _batch(model: Model, rows: list[Tensor], size: int) -> Tensor:
    X = torch.cat(rows).to(device=model.device, dtype=model.dtype)
    if len(X) < size:
        X = torch.cat([X, X.new_zeros(size - len(X), *X.shape[1:])])
    return X.contiguous(memory_format=torch.channels_last)


def _spans(parts: Sequence[Part]) -> list[tuple[int, int]]:
    spans, at = [], 0
    for part in parts:
        spans.append((at, at + part.stop - part.start))
        at = spans[-1][1]
    return spans


@contextmanager
def _hooks(module: nn.Module, layers: Sequence[str], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    def hook(layer: str) -> Callable[[nn.Module, object, Tensor], Tensor | None]:
        return lambda _module, _args, output: see(layer, output)

    handles = [module.get_submodule(layer).register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
