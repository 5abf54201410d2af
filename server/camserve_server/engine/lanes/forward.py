"""Lanes of the kind "forward": predictions, activations, attention, and scores of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from camserve_server.engine.lanes.batch import batch_spans, check_replaceable, padded_batch
from camserve_server.engine.lanes.hooks import hooks
from camserve_server.engine.lanes.lane_query import BatchSlice, RowSum
from camserve_server.models.attention import attention_weights
from camserve_server.models.model import Model
from camserve_server.plan import (
    INPUT,
    Ablate,
    Attentions,
    Capture,
    CaptureAttention,
    Predict,
    Score,
    Scores,
    Sum,
    Sums,
)
from camserve_server.rows import to_device


@dataclass(eq=False)
class ForwardQuery:
    """Base class of the queries of lanes of the kind "forward".

    A query receives the logits of its rows. It can also read and replace the outputs of `layers`.

    Attributes:
        model: Network that answers the query.
        rows: Number of rows in all.
        layers: Names of the layers to hook.
        min_rows: Number of rows after which the query may be answered early; None if it needs all of them.
        done: Number of rows whose logits have been stored.
    """

    model: Model
    rows: int = 1
    layers: tuple[str, ...] = ()
    min_rows: int | None = None
    done: int = 0

    @property
    def max_per_batch(self) -> int:
        """Largest number of rows that one batch may contain: all of them."""
        return self.rows

    def make(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of the model's input, [stop − start, C, H, W]."""
        raise NotImplementedError

    def answer(self) -> Any:
        """Return the answer for the plan, made from the rows that have run."""
        raise NotImplementedError

    def is_complete(self) -> bool:
        """Return True if no further row is needed."""
        return self.done == self.rows

    def on_layer_output(self, layer: str, start: int, stop: int, output: Tensor) -> Tensor | None:
        """Read the output of a layer for rows [start, stop); a tensor that is returned replaces it."""
        raise NotImplementedError

    def take_logits(self, start: int, stop: int, logits: Tensor) -> None:
        """Store the logits [stop − start, classes] of those rows [start, stop) that are not stored already."""
        first = max(start, self.done)  # a batch that is run again repeats rows
        if first < stop:
            self.store_logits(first, stop, logits[first - start :])
            self.done = stop

    def store_logits(self, start: int, stop: int, logits: Tensor) -> None:
        """Store the part of the logits [stop − start, classes] of rows [start, stop) that the answer needs."""
        raise NotImplementedError


class PredictQuery(ForwardQuery):
    """One row; the answer is its logits [classes], float64."""

    def __init__(self, query: Predict, model: Model) -> None:
        super().__init__(model)
        self._x = query.x

    def make(self, start: int, stop: int) -> Tensor:
        """Return the image as [1, C, H, W]."""
        return self._x.row

    def store_logits(self, start: int, stop: int, logits: Tensor) -> None:
        """Keep the logits in float64."""
        self._logits = logits[0].double()

    def answer(self) -> Tensor:
        """Return the logits [classes], float64."""
        return self._logits


class CaptureQuery(ForwardQuery):
    """One row; the answer is the activations [K, h, w] of each layer."""

    def __init__(self, query: Capture, model: Model) -> None:
        super().__init__(model, layers=tuple(query.layers))
        self._x = query.x
        self._activations: dict[str, Tensor] = {}

    def make(self, start: int, stop: int) -> Tensor:
        """Return the image as [1, C, H, W]."""
        return self._x.row

    def on_layer_output(self, layer: str, start: int, stop: int, output: Tensor) -> None:
        """Copy the activations of the layer."""
        # The copy is made at once, because a later module may work in place on the output.
        activations = self.model.spatial[layer].grid(output)[0]
        self._activations[layer] = activations.to(self.model.dtype, copy=True, memory_format=torch.contiguous_format)

    def store_logits(self, start: int, stop: int, logits: Tensor) -> None:
        """Ignore the logits."""

    def answer(self) -> tuple[Tensor, ...]:
        """Return the activations [K, h, w] of each layer, in the order of the query."""
        return tuple(self._activations[layer] for layer in self.layers)


class CaptureAttentionQuery(ForwardQuery):
    """One row; the answer is the attention weights of each block of a transformer."""

    def __init__(self, query: CaptureAttention, model: Model) -> None:
        super().__init__(model, layers=tuple(name + INPUT for name in model.attention))
        self._x = query.x
        self._weights: dict[str, Tensor] = {}

    def make(self, start: int, stop: int) -> Tensor:
        """Return the image as [1, C, H, W]."""
        return self._x.row

    def on_layer_output(self, layer: str, start: int, stop: int, output: Tensor) -> None:
        """Compute the attention weights [heads, L, L] from the input of the attention module."""
        module = self.model.module.get_submodule(layer.removesuffix(INPUT))
        self._weights[layer] = attention_weights(module, output)[0].to(self.model.dtype)

    def store_logits(self, start: int, stop: int, logits: Tensor) -> None:
        """Ignore the logits."""

    def answer(self) -> Attentions:
        """Return the attention weights of each block with the layout of the tokens."""
        assert self.model.attention_grid is not None, "only models with attention receive a CaptureAttention query"
        blocks = tuple(self._weights[layer] for layer in self.layers)
        return Attentions(blocks, self.model.attention_prefix, self.model.attention_grid)


class ScoreQuery(ForwardQuery):
    """Scores of rows, or of the image with one channel set to zero in each row.

    The answer is the scores of all rows or, for a `Sum` query, the sum of a term over them.
    """

    def __init__(self, query: Score | Ablate, model: Model, sum_: Sum[Any] | None = None) -> None:
        if isinstance(query, Score):
            super().__init__(model, len(query.rows), min_rows=query.min_rows)
        else:
            check_replaceable(model, (query.layer,))
            super().__init__(model, len(query.channels), (query.layer,), query.min_rows)
        self._query = query
        self._index = to_device(model.device, query.c.index)
        self._sum = RowSum(sum_) if sum_ else None
        self._stopped = False
        size = (0 if sum_ else self.rows, len(query.c))
        self._logits = torch.empty(size, dtype=torch.float64, device=model.device)
        self._probabilities = torch.empty_like(self._logits)

    def make(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop), [stop − start, C, H, W]."""
        if isinstance(self._query, Score):
            return self._query.rows.make(start, stop)
        return self._query.x.tensor.expand(stop - start, -1, -1, -1)

    def on_layer_output(self, layer: str, start: int, stop: int, output: Tensor) -> Tensor:
        """Return a copy of the layer's output in which the channel of each row is zero (`Ablate`)."""
        assert isinstance(self._query, Ablate)
        changed = output.clone()
        rows = torch.arange(stop - start, device=output.device)
        channels = to_device(output.device, self._query.channels[start:stop])
        if self.model.spatial[layer].form == "NCHW":
            changed[rows, channels] = 0
        else:
            changed[rows, ..., channels] = 0
        return changed

    def store_logits(self, start: int, stop: int, logits: Tensor) -> None:
        """Store logits and probabilities of the targets, or add them to the sum."""
        y, p = logits[:, self._index].double(), self.model.probabilities(logits)[:, self._index]
        if self._sum:
            self._sum.add(start, [Scores(y[i : i + 1], p[i : i + 1]) for i in range(len(y))])
        else:
            self._logits[start:stop], self._probabilities[start:stop] = y, p
            if isinstance(self._query, Score) and self._query.stop is not None:
                self._stopped = self._query.stop(start, Scores(y, p))

    def is_complete(self) -> bool:
        """Return True if all rows have run or the query's `stop` callback has returned True."""
        return self._stopped or super().is_complete()

    def answer(self) -> Scores | Sums:
        """Return the scores [n, T] of the n rows that have run, or their sum."""
        if self._sum:
            return self._sum.answer()
        return Scores(self._logits[: self.done], self._probabilities[: self.done])


def run_forward(model: Model, slices: Sequence[BatchSlice], size: int, *, fast: bool) -> None:
    """Run one batch of a lane of the kind "forward".

    Args:
        model: Network to run.
        slices: Rows of one or more queries.
        size: Number of rows of the batch; padding rows fill it up.
        fast: True for a lane of the fast forward pass, whose queries have no hooks (`Lane.fast_forward`).
    """
    spans = batch_spans(slices)
    queries: list[ForwardQuery] = []
    for each in slices:
        assert isinstance(each.query, ForwardQuery)
        queries.append(each.query)
    rows = [query.make(each.start, each.stop) for query, each in zip(queries, slices, strict=True)]
    X = padded_batch(model, rows, size)
    del rows  # they may be copies, which the forward pass does not need

    def on_output(layer: str, output: Tensor) -> Tensor | None:
        changed = None
        for query, each, (start, stop) in zip(queries, slices, spans, strict=True):
            if layer in query.layers:
                new = query.on_layer_output(layer, each.start, each.stop, output[start:stop])
                if new is not None:
                    changed = output.clone() if changed is None else changed
                    changed[start:stop] = new
        return changed

    layers = dict.fromkeys(layer for query in queries for layer in query.layers)
    with hooks(model, layers, on_output):
        forward = model.fast_forward if fast else None
        if forward is None or size != model.fast_forward_size:  # batches are smaller after a lack of memory
            forward = model.module
        logits = forward(X).to(model.dtype)
    for query, each, (start, stop) in zip(queries, slices, spans, strict=True):
        query.take_logits(each.start, each.stop, logits[start:stop])
