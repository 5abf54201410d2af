"""Law: metrics do their long work on the host through `OnHost`, because all requests wait for the engine's thread.

The first test counts work instead of time, so that it does not depend on the machine.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from camserve_server import registry
from camserve_server.maps import boxes
from camserve_server.plan import Answer, Plan, Query, Rows, Score, Sum
from camserve_server.request_plan import plan_request, rows_needed
from tests import nets
from tests.support import TIMEOUT_S, as_model, call, explained, metric, noise, running

T = TypeVar("T")
SIZE = (224, 224)
# Limits of the work between two queries, and of the work for one row.
MAX_CALLS = 1_500  # calls by Python code
MAX_MAPS = 40  # values that operations of torch return, in multiples of the number of pixels


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Work on the current thread inside of `counting`: calls by Python code, and values that torch returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the values of its results."""
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            self.values += each.numel() if isinstance(each, Tensor) else 0
        return result

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the work inside of the context."""

        def profile(frame: FrameType, event: str, arg: object) -> None:
            self.calls += event in ("call", "c_call")

        before = sys.getprofile()  # of a debugger or a coverage tool
        with self:
            sys.setprofile(profile)
            try:
                yield
            finally:
                sys.setprofile(before)


@dataclass(frozen=True, eq=False)
class CountedRows:
    """Rows that record the work of each `make`."""

    rows: Rows
    makes: list[tuple[int, Work]]

    def __len__(self) -> int:
        return len(self.rows)

    def make(self, start: int, stop: int) -> Tensor:
        self.makes.append((stop - start, Work()))
        with self.makes[-1][1].counting():
            return self.rows.make(start, stop)


def counted(plan: Plan[T], steps: list[Work], makes: list[tuple[int, Work]]) -> Plan[T]:
    """Run a plan, and record the work of each step and of the creation of its rows."""
    answer: Answer[Any] | None = None
    while True:
        steps.append(Work())
        try:
            with steps[-1].counting():
                query = plan.send(answer)  # type: ignore[arg-type]  # the first send of a generator must be None
        except StopIteration as stop:
            result: T = stop.value
            return result
        value = yield from with_counted_rows(query, makes)  # the work of the engine for the answer does not count
        answer = partial(_same, value)


def _same(value: T) -> T:
    return value


def with_counted_rows(query: Query[Any], makes: list[tuple[int, Work]]) -> Query[Any]:
    if isinstance(query, Sum):
        return replace(query, query=with_counted_rows(query.query, makes))
    return replace(query, rows=CountedRows(query.rows, makes)) if isinstance(query, Score) else query


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registry.METRICS))
def test_metric_does_its_long_work_on_another_thread(name: str) -> None:
    metrics = [metric(name)]
    with running() as engine:
        for size in ((32, 32), SIZE):  # libraries load modules at the first call, which is not checked
            model = as_model(nets.tiny_cnn(), size, batch_size=8)
            truth = boxes.make_truth([(0.2 * size[1], 0.3 * size[0], 0.5 * size[1], 0.7 * size[0])], None, size)
            subject = call(model, "grad-cam")
            steps: list[Work] = []
            makes: list[tuple[int, Work]] = []
            plan = plan_request(model, model.image(noise(3, *size)), [1], subject, metrics, truth)
            job = engine.submit(counted(plan, steps, makes), model, rows=rows_needed(model, subject, metrics, 1).most)
            job.future.result(TIMEOUT_S)
    pixels = SIZE[0] * SIZE[1]
    assert max(step.calls for step in steps) < MAX_CALLS
    assert max(step.values / pixels for step in steps) < MAX_MAPS
    assert all(work.calls < MAX_CALLS * rows for rows, work in makes)
    assert all(work.values / pixels < MAX_MAPS * rows for rows, work in makes)


def test_nodes_of_the_quadrature_are_computed_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    original = np.polynomial.legendre.leggauss

    def leggauss(steps: int) -> Any:
        threads.append(threading.current_thread().name)
        return original(steps)

    monkeypatch.setattr(np.polynomial.legendre, "leggauss", leggauss)
    model = as_model(nets.tiny_cnn())
    explained(model, noise(3, 32, 32), call(model, "integrated-gradients", steps=3))
    assert [name.partition("_")[0] for name in threads] == ["host"]
