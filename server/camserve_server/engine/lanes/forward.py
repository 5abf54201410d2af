"""The forward lane: predictions, activations, attention, and scores of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from camserve_server.engine.lanes.work import Part, Total, batch, hooks, spans_of
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
class Forward:
    """What forward works share: they are handed their rows' logits, and may look at layers or change their outputs."""

    model: Model
    rows: int = 1
    layers: tuple[str, ...] = ()
    least: int | None = None
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

    def see(self, layer: str, start: int, stop: int, output: Tensor) -> Tensor | None:
        """The module's output for rows [start, stop); what is returned takes its place."""
        raise NotImplementedError

    def take(self, start: int, stop: int, logits: Tensor) -> None:
        if stop > self.done:  # a batch that is tried again brings what is known
            self.keep(start, stop, logits)
            self.done = stop

    def keep(self, start: int, stop: int, logits: Tensor) -> None:
        raise NotImplementedError


class Predicting(Forward):
    def __init__(self, query: Predict, model: Model) -> None:
        super().__init__(model)
        self._x = query.x

    def make(self, start: int, stop: int) -> Tensor:
        return self._x.tensor[None]

    def keep(self, start: int, stop: int, logits: Tensor) -> None:
        self._logits = logits[0].double()

    def answer(self) -> Tensor:
        return self._logits


class Capturing(Forward):
    def __init__(self, query: Capture, model: Model) -> None:
        super().__init__(model, layers=tuple(query.layers))
        self._x = query.x
        self._seen: dict[str, Tensor] = {}

    def make(self, start: int, stop: int) -> Tensor:
        return self._x.tensor[None]

    def see(self, layer: str, start: int, stop: int, output: Tensor) -> None:
        # Copied at once: a later module may work in place on it.
        seen = self.model.spatial[layer].grid(output)[0]
        self._seen[layer] = seen.to(self.model.dtype, copy=True, memory_format=torch.contiguous_format)

    def keep(self, start: int, stop: int, logits: Tensor) -> None:
        pass

    def answer(self) -> tuple[Tensor, ...]:
        return tuple(self._seen[layer] for layer in self.layers)


class Attending(Forward):
    def __init__(self, query: CaptureAttention, model: Model) -> None:
        super().__init__(model, layers=tuple(name + INPUT for name in model.attention))
        self._x = query.x
        self._seen: dict[str, Tensor] = {}

    def make(self, start: int, stop: int) -> Tensor:
        return self._x.tensor[None]

    def see(self, layer: str, start: int, stop: int, output: Tensor) -> None:
        module = self.model.module.get_submodule(layer.removesuffix(INPUT))
        self._seen[layer] = attention_weights(module, output)[0].to(self.model.dtype)

    def keep(self, start: int, stop: int, logits: Tensor) -> None:
        pass

    def answer(self) -> Attentions:
        assert self.model.attention_grid is not None, "a model that is asked for its attention has some"
        blocks = tuple(self._seen[layer] for layer in self.layers)
        return Attentions(blocks, self.model.attention_prefix, self.model.attention_grid)


class Scoring(Forward):
    """Rows of a recipe, or the image with a channel taken out; all scores, or the sum of a term of them."""

    def __init__(self, query: Score | Ablate, model: Model, sum_: Sum[Any] | None = None) -> None:
        if isinstance(query, Score):
            super().__init__(model, len(query.rows), least=query.min_rows)
        else:
            super().__init__(model, len(query.channels), (query.layer,), query.min_rows)
        self._query = query
        self._index = to_device(model.device, query.c.index)
        self._total = Total(sum_) if sum_ else None
        self._enough = False
        size = (0 if sum_ else self.rows, len(query.c))
        self._logits = torch.empty(size, dtype=torch.float64, device=model.device)
        self._probabilities = torch.empty_like(self._logits)

    def make(self, start: int, stop: int) -> Tensor:
        if isinstance(self._query, Score):
            return self._query.rows.make(start, stop)
        return self._query.x.tensor.expand(stop - start, -1, -1, -1)

    def see(self, layer: str, start: int, stop: int, output: Tensor) -> Tensor:
        assert isinstance(self._query, Ablate)
        changed = output.clone()
        rows = torch.arange(stop - start, device=output.device)
        channels = to_device(output.device, self._query.channels[start:stop])
        if self.model.spatial[layer].form == "NCHW":
            changed[rows, channels] = 0
        else:
            changed[rows, ..., channels] = 0
        return changed

    def keep(self, start: int, stop: int, logits: Tensor) -> None:
        y, p = logits[:, self._index].double(), self.model.probabilities(logits)[:, self._index]
        if self._total:
            self._total.add(start, [Scores(y[i : i + 1], p[i : i + 1]) for i in range(len(y))])
        else:
            self._logits[start:stop], self._probabilities[start:stop] = y, p
            if isinstance(self._query, Score) and self._query.stop is not None:
                self._enough = self._query.stop(start, Scores(y, p))

    def answered(self) -> bool:
        return self._enough or super().answered()

    def answer(self) -> Scores | Sums:
        if self._total:
            return self._total.answer()
        return Scores(self._logits[: self.done], self._probabilities[: self.done])


def run_forward(model: Model, parts: Sequence[Part], size: int) -> None:
    X = batch(model, [part.work.make(part.start, part.stop) for part in parts], size)
    spans = spans_of(parts)
    works: list[Forward] = []
    for part in parts:
        assert isinstance(part.work, Forward)
        works.append(part.work)

    def see(layer: str, output: Tensor) -> Tensor | None:
        changed = None
        for work, part, (start, stop) in zip(works, parts, spans, strict=True):
            if layer in work.layers:
                new = work.see(layer, part.start, part.stop, output[start:stop])
                if new is not None:
                    changed = output.clone() if changed is None else changed
                    changed[start:stop] = new
        return changed

    layers = dict.fromkeys(layer for work in works for layer in work.layers)
    with hooks(model, layers, see):
        forward = model.module if layers or model.bare is None or size != model.bare_size else model.bare
        logits = forward(X).to(model.dtype)
    for work, part, (start, stop) in zip(works, parts, spans, strict=True):
        work.take(part.start, part.stop, logits[start:stop])
