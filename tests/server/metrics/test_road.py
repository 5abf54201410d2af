"""ROAD imputes its images outside of the engine's thread, and only a few of them exist at a time."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, TypeVar

import pytest

from camserve_server.metrics import road
from camserve_server.plan import Answer, Plan, Score, Targets
from tests import nets
from tests.support import TIMEOUT_S, as_model, explained, metric, noise, running

T = TypeVar("T")
X, S = noise(3, 32, 32), noise(32, 32, seed=1).sigmoid()


def recorded(plan: Plan[T], scores: list[Score]) -> Plan[T]:
    """Run a plan and record its `Score` queries."""
    answer: Answer[Any] | None = None
    while True:
        try:
            query = plan.send(answer)  # type: ignore[arg-type]  # the first send of a generator must be None
        except StopIteration as stop:
            result: T = stop.value
            return result
        scores += [query] if isinstance(query, Score) else []
        answer = partial(_same, (yield from query))


def _same(value: T) -> T:
    return value


def test_few_images_exist_at_a_time() -> None:
    model = as_model(nets.tiny_cnn())
    scores: list[Score] = []
    c = Targets((1,), noise(1).sigmoid(), noise(1))
    with running() as engine:
        plan = road.road(model.image(X), c, S, steps=20, seed=0)
        job = engine.submit(recorded(plan, scores), model, rows=40)
        job.future.result(TIMEOUT_S)
    assert [len(query.rows) for query in scores] == [16, 16, 8]
    assert job.rows == 40


def test_value_does_not_depend_on_the_number_of_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_model(nets.tiny_cnn())
    together = explained(model, X, S, [1], [metric("road")]).scores
    monkeypatch.setattr(road, "CHUNK", 5)
    assert explained(model, X, S, [1], [metric("road")]).scores == together


def test_pixels_are_imputed_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_model(nets.tiny_cnn())
    threads, imputed = set(), road.imputed

    def observed(*args: Any) -> Any:
        threads.add(threading.current_thread().name.split("_")[0])
        return imputed(*args)

    monkeypatch.setattr(road, "imputed", observed)
    explained(model, X, S, [1], [metric("road")])
    assert threads == {"host"}
