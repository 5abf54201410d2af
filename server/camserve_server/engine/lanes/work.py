"""What all lanes share: works and parts of them, sums over rows, batches, and hooks that show layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from camserve_server.errors import Unservable
from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import INPUT, Sum, Sums


@dataclass(frozen=True)
class Lane:
    """Works of one lane share batches: the same model, passes, batch size, and layers to differentiate.

    `copy` is the request whose own copy of the model it is; 0 for the model itself. `bare` are those that look at no
    layer, where the model has a way of its own for them: their bits must not depend on who shares a batch.
    """

    model: str
    kind: LaneKind
    size: int
    layers: tuple[str, ...] = ()
    copy: int = 0
    bare: bool = False


class Work(Protocol):
    """A question under way: `rows` in all, at most `width` in one batch; `layers` to be hooked.

    One that has a `least` may be answered after so many rows.
    """

    @property
    def rows(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> tuple[str, ...]: ...
    @property
    def least(self) -> int | None: ...

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


class Total:
    """Sums over rows, added one by one in their order: the bits do not depend on how the rows came in batches.

    A row that is in the sum is not added again: a batch that has failed half-way is run a second time.
    """

    def __init__(self, query: Sum[Any]) -> None:
        self._term = query.term
        self._totals: list[Tensor | None] = [None] * query.groups
        self._counts = [0] * query.groups

    def add(self, start: int, answers: Sequence[object]) -> None:
        for i, answer in enumerate(answers, start):
            if i < sum(self._counts):
                continue
            group = i % len(self._totals)
            term, total = self._term(i, answer), self._totals[group]
            self._totals[group] = term.clone() if total is None else total.add_(term)
            self._counts[group] += 1

    def answer(self) -> Sums:
        totals = [total for total in self._totals if total is not None]
        return Sums(torch.stack(totals), torch.tensor(self._counts, device=totals[0].device))


def batch(model: Model, rows: list[Tensor], size: int) -> Tensor:
    """The rows as one input [size, C, H, W], the last of it zeros."""
    missing = size - sum(map(len, rows))
    if missing:
        rows = [*rows, rows[0].new_zeros(missing, *rows[0].shape[1:])]
    together = torch.cat(rows) if len(rows) > 1 else rows[0]
    # A copy in any case: the network may work in place on it.
    alone = len(rows) == 1
    return together.to(model.device, model.arithmetic, copy=alone, memory_format=torch.channels_last)


@contextmanager
def arithmetic(model: Model) -> Iterator[None]:
    """Has a GPU compute in TF32 for a model that asks for it; nothing else does (`pick_device`)."""
    wanted = model.precision == "tf32"
    if wanted:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        if wanted:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def check_differentiable(model: Model, logits: Tensor) -> None:
    """Raises Unservable where no gradient can come back from the logits."""
    if not logits.requires_grad:
        raise Unservable(
            f"no gradient of {model.name}'s logits reaches what is asked about: the network computes it under no_grad, "
            "or makes no use of it; name another layer or take a method without gradients"
        )


def spans_of(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Where in the batch each part's rows are: (start, stop)."""
    spans, at = [], 0
    for part in parts:
        spans.append((at, at + part.stop - part.start))
        at = spans[-1][1]
    return spans


@contextmanager
def hooks(model: Model, layers: Iterable[str], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Shows the output of each layer; what `see` returns takes its place. "NAME<input>" shows the module's input."""
    handles = []
    wanted: dict[str, dict[int, str]] = {}  # module → call → layer
    for name in layers:
        if name.endswith(INPUT):
            module = model.module.get_submodule(name.removesuffix(INPUT))
            handles.append(module.register_forward_pre_hook(_shows_input(name, see)))
        else:
            layer = model.spatial[name]
            wanted.setdefault(layer.module, {})[layer.call] = name
    for owner, calls in wanted.items():
        handles.append(model.module.get_submodule(owner).register_forward_hook(_shows_output(calls, see)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shows_input(name: str, see: Callable[[str, Tensor], Tensor | None]) -> Callable[..., None]:
    def hook(module: object, args: tuple[Tensor, ...]) -> None:
        see(name, args[0])

    return hook


def _shows_output(calls: Mapping[int, str], see: Callable[[str, Tensor], Tensor | None]) -> Callable[..., Any]:
    count = itertools.count(1)

    def hook(module: object, args: object, output: Tensor) -> Tensor | None:
        layer = calls.get(next(count))
        return see(layer, output) if layer else None

    return hook
