"""Lanes of the kind "gradient": one forward and one backward pass for each row, for the requested layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camserve_server.engine.lanes.batch import batch_spans, check_differentiable, check_replaceable, padded_batch
from camserve_server.engine.lanes.hooks import hooks
from camserve_server.engine.lanes.lane_query import BatchSlice, RowSum
from camserve_server.models.model import Model, Precision
from camserve_server.plan import INPUT, Gradient, Gradients, Sum, Sums
from camserve_server.rows import to_device

# Largest sum over channels of gradient times activation that counts as zero, relative to the sum of absolute products.
# Behind a layer norm, rounding in bfloat16 reaches 2e-3, and the ε of the norm 3e-5 in every precision.
ROUNDING: dict[Precision, float] = {"fp64": 1e-4, "fp32": 1e-4, "tf32": 1e-3, "bf16": 5e-3, "fp16": 1e-3}


class GradientQuery:
    """Activations and gradients of layers, row by row, or the sum of a term over the rows.

    Attributes:
        rows: Number of rows in all.
        max_per_batch: Largest number of rows that one batch may contain: all of them.
        layers: Names of the layers to differentiate; `INPUT` stands for the rows themselves.
        index: Class whose logit is differentiated, for each row.
        min_rows: Number of rows after which the query may be answered early; None if it needs all of them.
    """

    def __init__(self, query: Gradient, model: Model, sum_: Sum[Any] | None = None) -> None:
        check_replaceable(model, query.layers)
        self.rows = self.max_per_batch = len(query.rows)
        self.layers = tuple(query.layers)
        self.index = tuple(query.index)
        self.min_rows = query.min_rows
        self._rows = query.rows
        self._dtype = model.dtype
        self._rounding = ROUNDING[model.precision]
        self._sum = RowSum(sum_) if sum_ else None
        self._batches: list[Gradients] = []
        self._done = 0

    def make(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop), [stop − start, C, H, W]."""
        return self._rows.make(start, stop)

    def take_gradients(self, start: int, stop: int, activations: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Store copies of the activations and gradients of rows [start, stop), or add them to the sum.

        Rows that are stored already are left out, because a batch that is run again repeats rows.

        Args:
            start: Index of the first row.
            stop: Index after the last row.
            activations: Activations [stop − start, K, h, w] of each layer.
            gradients: Gradients ∂y_c/∂A of the same shapes.
        """
        first = max(start, self._done)
        if first >= stop:
            return
        new_activations, new_gradients = (
            detached_copies([value[first - start :] for value in values], self._dtype)
            for values in (activations, gradients)
        )
        batch = Gradients(new_activations, new_gradients, self._rounding)
        if self._sum:
            self._sum.add(first, [_row(batch, i) for i in range(stop - first)])
        else:
            self._batches.append(batch)
        self._done = stop

    def is_complete(self) -> bool:
        """Return True if all rows have run."""
        return self._done == self.rows

    def answer(self) -> Gradients | Sums:
        """Return activations and gradients [n, K, h, w] of each layer for the n rows that have run, or their sum."""
        if self._sum:
            return self._sum.answer()
        each = range(len(self.layers))
        return Gradients(
            tuple(torch.cat([batch.activations[i] for batch in self._batches]) for i in each),
            tuple(torch.cat([batch.gradients[i] for batch in self._batches]) for i in each),
            self._rounding,
        )


def detached_copies(values: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return contiguous copies of the tensors in `dtype`, without their autograd graph."""
    return tuple(value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format) for value in values)


def _row(batch: Gradients, i: int) -> Gradients:
    """Return row i of a batch, with a leading dimension of 1."""
    activations, gradients = (
        tuple(value[i : i + 1] for value in values) for values in (batch.activations, batch.gradients)
    )
    return Gradients(activations, gradients, batch.rounding)


def run_gradient(model: Model, slices: Sequence[BatchSlice], size: int) -> None:
    """Run one batch of a lane of the kind "gradient".

    Args:
        model: Network to run.
        slices: Rows of one or more queries that differentiate the same layers.
        size: Number of rows of the batch; padding rows fill it up.

    Raises:
        Unservable: No gradient of the logits reaches the layers.
    """
    layers = slices[0].query.layers
    rows = []
    for each in slices:
        assert isinstance(each.query, GradientQuery)
        rows.append(each.query.make(each.start, each.stop))
    X = padded_batch(model, rows, size)
    del rows  # they may be copies, which the passes do not need
    outputs: dict[str, Tensor] = {}

    def capture(layer: str, output: Tensor) -> Tensor:
        # The graph begins at the first requested layer: nothing before it is kept for a backward pass. The network goes
        # on with a copy, so that a later module that works in place does not change the activation.
        kept = output if output.requires_grad else output.detach().requires_grad_()
        outputs[layer] = kept
        with torch.enable_grad():  # the network may have switched it off before this layer, as in a frozen backbone
            return kept.clone()

    with torch.enable_grad(), hooks(model, [layer for layer in layers if layer != INPUT], capture):
        if INPUT in layers:
            X = capture(INPUT, X)
        logits = model.module(X).to(model.dtype)
        check_differentiable(model, logits.requires_grad)
        spans = batch_spans(slices)
        chosen = logits.new_zeros(())
        for each, (start, stop) in zip(slices, spans, strict=True):
            assert isinstance(each.query, GradientQuery)
            index = to_device(logits.device, each.query.index[each.start : each.stop])
            chosen = chosen + logits[start:stop].gather(1, index[:, None]).sum()
        found = torch.autograd.grad(chosen, [outputs[layer] for layer in layers], allow_unused=True)
    check_differentiable(model, any(gradient is not None for gradient in found))
    # The gradient of a layer that the logits do not depend on is zero.
    raw = [
        torch.zeros_like(outputs[layer]) if gradient is None else gradient
        for layer, gradient in zip(layers, found, strict=True)
    ]
    grids = [model.spatial[layer].grid if layer != INPUT else _identity for layer in layers]
    activations = [grid(outputs[layer]) for grid, layer in zip(grids, layers, strict=True)]
    gradients = [grid(gradient) for grid, gradient in zip(grids, raw, strict=True)]
    for each, (start, stop) in zip(slices, spans, strict=True):
        assert isinstance(each.query, GradientQuery)
        each.query.take_gradients(
            each.start, each.stop, [A[start:stop] for A in activations], [g[start:stop] for g in gradients]
        )


def _identity(values: Tensor) -> Tensor:
    return values
