"""The gradient lane: one forward and backward pass a row, for the layers asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camserve_server.engine.lanes.work import Part, Total, batch, check_differentiable, hooks, spans_of
from camserve_server.models.model import Model
from camserve_server.plan import INPUT, Gradient, Gradients, Sum, Sums
from camserve_server.rows import to_device


class Differentiating:
    """Gathers activations and gradients of the layers, row by row, or the sum of a term of them."""

    def __init__(self, query: Gradient, model: Model, sum_: Sum[Any] | None = None) -> None:
        self.rows = self.width = len(query.rows)
        self.layers = tuple(query.layers)
        self.index = tuple(query.index)
        self.least = query.min_rows
        self._rows = query.rows
        self._dtype = model.dtype
        self._total = Total(sum_) if sum_ else None
        self._found: list[Gradients] = []
        self._done = 0

    def make(self, start: int, stop: int) -> Tensor:
        return self._rows.make(start, stop)

    def take(self, start: int, stop: int, activations: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        if stop <= self._done:  # a batch that is tried again, part by part
            return
        found = Gradients(_own(activations, self._dtype), _own(gradients, self._dtype))
        if self._total:
            self._total.add(start, [_row(found, i) for i in range(stop - start)])
        else:
            self._found.append(found)
        self._done = stop

    def answered(self) -> bool:
        return self._done == self.rows

    def answer(self) -> Gradients | Sums:
        if self._total:
            return self._total.answer()
        each = range(len(self.layers))
        return Gradients(
            tuple(torch.cat([found.activations[i] for found in self._found]) for i in each),
            tuple(torch.cat([found.gradients[i] for found in self._found]) for i in each),
        )


def _own(values: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format) for value in values)


def _row(found: Gradients, i: int) -> Gradients:
    rows = [tuple(value[i : i + 1] for value in values) for values in (found.activations, found.gradients)]
    return Gradients(*rows)


def run_gradient(model: Model, parts: Sequence[Part], size: int) -> None:
    layers = parts[0].work.layers
    X = batch(model, [part.work.make(part.start, part.stop) for part in parts], size)
    outputs: dict[str, Tensor] = {}

    def capture(layer: str, output: Tensor) -> Tensor:
        # The graph begins at the first layer that is asked for: nothing before it is kept for a backward pass. What
        # goes on is a copy, so that a later module that works in place leaves the activation alone.
        kept = output if output.requires_grad else output.detach().requires_grad_()
        outputs[layer] = kept
        with torch.enable_grad():  # the network may have it off up to here, as for a frozen backbone
            return kept.clone()

    with torch.enable_grad(), hooks(model, [layer for layer in layers if layer != INPUT], capture):
        if INPUT in layers:
            X = capture(INPUT, X)
        logits = model.module(X).to(model.dtype)
        check_differentiable(model, logits)
        spans = spans_of(parts)
        chosen = logits.new_zeros(())
        for part, (start, stop) in zip(parts, spans, strict=True):
            assert isinstance(part.work, Differentiating)
            index = to_device(logits.device, part.work.index[part.start : part.stop])
            chosen = chosen + logits[start:stop].gather(1, index[:, None]).sum()
        # A layer that the logits do not depend on has the gradient zero.
        found = torch.autograd.grad(
            chosen, [outputs[layer] for layer in layers], allow_unused=True, materialize_grads=True
        )
    grids = [model.spatial[layer].grid if layer != INPUT else _as_it_is for layer in layers]
    activations = [grid(outputs[layer]) for grid, layer in zip(grids, layers, strict=True)]
    gradients = [grid(gradient) for grid, gradient in zip(grids, found, strict=True)]
    for part, (start, stop) in zip(parts, spans, strict=True):
        assert isinstance(part.work, Differentiating)
        part.work.take(part.start, part.stop, [A[start:stop] for A in activations], [g[start:stop] for g in gradients])


def _as_it_is(values: Tensor) -> Tensor:
    return values
