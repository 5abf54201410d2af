"""Batches that run out of memory, and then fail because of one request: the other requests run again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from camserve_server.engine import batch_runner
from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Job
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane, run_batch
from camserve_server.errors import InternalError
from camserve_server.methods.poly_cam import StoppingRule
from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import Gradient, Gradients, Query, Score, Scores, Sum, Targets
from tests import nets
from tests.support import TIMEOUT_S, as_model, noise, running, stopped

NONE = torch.zeros(1, dtype=torch.float64)
C = Targets((1,), NONE, NONE)
SIZES: dict[LaneKind, int] = {"forward": 12, "gradient": 12, "ascend": 12}
FITS = 6


class Different:
    """Rows that differ from each other."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._count

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop)."""
        return torch.stack([noise(3, 32, 32, seed=i) for i in range(start, stop)])


class Broken(Different):
    """Rows that cannot be made."""

    def make(self, start: int, stop: int) -> Tensor:
        """Raise an error."""
        raise ValueError("a bug in a plan")


def scores(model: Model, rows: Different) -> Query[Any]:
    return Score(rows, C)


def gradients(model: Model, rows: Different) -> Query[Any]:
    assert model.layer is not None
    return Gradient(rows, [1] * len(rows), (model.layer.name,))


def score_sum(model: Model, rows: Different) -> Query[Any]:
    def term(i: int, answer: Scores) -> Tensor:
        return (i + 1) * answer.logits

    return Sum(Score(rows, C), term)


def gradient_sum(model: Model, rows: Different) -> Query[Any]:
    def term(i: int, answer: Gradients) -> Tensor:
        return (i + 1) * answer.gradients[0]

    return Sum(gradients(model, rows), term)


def tensors(answer: object) -> list[Tensor]:
    """Return all tensors of an answer."""
    values = [each for value in vars(answer).values() for each in (value if isinstance(value, tuple) else (value,))]
    found = [each for each in values if isinstance(each, Tensor)]
    assert found and all(isinstance(each, Tensor | float) for each in values)
    return found


@pytest.mark.parametrize("query", [scores, gradients, score_sum, gradient_sum])
@pytest.mark.parametrize("rows", [(3, 6, 1), (6, 1), (1, 6)], ids=["third", "last", "first"])
def test_rows_count_once_if_a_part_of_a_halved_batch_fails(
    monkeypatch: pytest.MonkeyPatch, query: Any, rows: Sequence[int]
) -> None:
    """The request of one row, the first or the last of the batch, cannot make its row."""
    model = as_model(nets.tiny_cnn())

    def submitted(engine: Engine, each: Different) -> Job[Any]:
        return engine.submit(iter(query(model, each)), model, rows=len(each), batch_sizes=SIZES)

    good, bad = [Different(count) for count in rows if count > 1], Broken(1)
    order = [bad, *good] if rows[0] == 1 else [*good, bad]
    with running() as engine:
        expected = [tensors(submitted(engine, each).future.result(TIMEOUT_S)) for each in good]

    def limited(model: Model, lane: Lane, slices: Sequence[BatchSlice], size: int) -> None:
        if size > FITS:
            raise torch.OutOfMemoryError("no memory")
        run_batch(model, lane, slices, size)

    monkeypatch.setattr(batch_runner, "run_batch", limited)
    # Requests that owe equally many rows keep their order.
    with running() as engine:
        with stopped(engine):
            jobs = [engine.submit(iter(query(model, each)), model, rows=12, batch_sizes=SIZES) for each in order]
        found = [
            tensors(job.future.result(TIMEOUT_S)) for job, each in zip(jobs, order, strict=True) if each is not bad
        ]
        with pytest.raises(InternalError):
            jobs[order.index(bad)].future.result(TIMEOUT_S)
        assert engine.counters.batches == 1, "all rows are in one batch"
    assert len(found) == len(expected)
    for theirs, ours in zip(found, expected, strict=True):
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_stopping_rule_counts_rows_once_that_are_scored_again() -> None:
    """The rule may run out of memory after it has stored rows, and the batch is then run again."""
    A = torch.tensor([8.0, 4.0, 2.0, 1.0]).view(4, 1, 1)
    p = torch.tensor([1.0, 0.5, 0.25, 1.0], dtype=torch.float64).view(4, 1)
    rule = StoppingRule(A, lambda parts: parts[0], 1, torch.ones(1, dtype=torch.float64), 0.1)
    stops = [rule(start, Scores(p[start:stop], p[start:stop])) for start, stop in ((0, 2), (0, 2), (2, 4))]
    assert (stops, rule.done) == ([False, False, True], 3)
    assert rule.error == pytest.approx([1 / (8 + 4 * 0.5 + 2 * 0.25)])
