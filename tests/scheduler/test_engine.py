"""The engine when things go wrong: a failure stays with the request that it belongs to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from camserve_server import engine as engine_module
from camserve_server.device import Lane, Part
from camserve_server.engine import Engine
from camserve_server.errors import Cancelled, Expired, InternalError, OutOfMemory, Unavailable
from camserve_server.models.model import Model
from camserve_server.plan import Plan, Predict
from tests import nets
from tests.support import as_model, call, noise, running, submit

X = noise(3, 32, 32)


@pytest.fixture
def model() -> Model:
    return as_model(nets.tiny_cnn())


def limited(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """A device without room for more than `largest` rows."""
    run = engine_module.run

    def small(model: Model, lane: Lane, parts: Sequence[Part], size: int) -> None:
        if size > largest:
            raise torch.OutOfMemoryError("no room")
        run(model, lane, parts, size)

    monkeypatch.setattr(engine_module, "run", small)


@pytest.mark.parametrize("method", ["poly-cam", "opti-cam", "grad-cam"])
def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch, model: Model, method: str) -> None:
    parameters: dict[str, object] = {"steps": 10} if method == "opti-cam" else {}
    with running(model) as engine:
        plain = submit(engine, model, X, call(model, method, **parameters), [1, 2, 3]).future.result(60)
        rows = engine.counters.rows
        limited(monkeypatch, 1)
        tight = submit(engine, model, X, call(model, method, **parameters), [1, 2, 3]).future.result(60)
        assert engine.counters.rows == 2 * rows, "no row is lost or done twice"
    assert model.batch_sizes["forward"] == 1
    assert torch.allclose(plain.maps, tight.maps, atol=1e-3)


def test_not_even_one_row_fits(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    with running(model) as engine:
        limited(monkeypatch, 0)
        with pytest.raises(OutOfMemory):
            submit(engine, model, X, call(model, "grad-cam")).future.result(60)


def broken(model: Model) -> Plan[None]:
    yield from Predict(model.image(X))
    raise ValueError("a bug in a method")


def grad_mode_left_on(model: Model) -> Plan[None]:
    torch.set_grad_enabled(True)
    yield from Predict(model.image(X))


def wrong_row(model: Model) -> Plan[None]:
    """Its row does not fit the network, and fails the batch that it is in."""
    yield from Predict(model.image(noise(5, 32, 32)[:, :32, :32]))


@pytest.mark.parametrize("plan", [broken, grad_mode_left_on, wrong_row])
def test_a_plan_that_fails_fails_alone(model: Model, plan: Any) -> None:
    with running(model) as engine:
        alone = submit(engine, model, X, call(model, "poly-cam")).future.result(60)
        good = [submit(engine, model, X, call(model, "poly-cam")) for _ in range(3)]
        bad = [engine.submit(plan(model), model, rows=1) for _ in range(3)]
        for job in bad:
            with pytest.raises(InternalError) as caught:
                job.future.result(60)
            assert "bug" not in caught.value.message
        for job in good:
            assert torch.equal(job.future.result(60).maps, alone.maps)


def test_deadline_cancel_and_close(model: Model) -> None:
    engine = Engine({model.name: model})
    engine.start()
    long = call(model, "opti-cam", steps=10_000)
    late = submit(engine, model, X, long, deadline=time.monotonic() + 0.1)
    cancelled = submit(engine, model, X, long)
    running_on = submit(engine, model, X, long)
    engine.cancel(cancelled)
    with pytest.raises(Expired):
        late.future.result(30)
    with pytest.raises(Cancelled):
        cancelled.future.result(30)
    assert engine.rows_owed() > 5000
    engine.close()
    with pytest.raises(Unavailable):
        running_on.future.result(30)
    with pytest.raises(Unavailable):
        submit(engine, model, X, long)
    assert engine.rows_owed() == 0
    assert engine.died.result(1) is None


def test_an_engine_that_breaks_lets_nobody_wait(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    engine = Engine({model.name: model})
    engine.start()
    monkeypatch.setattr(engine, "_run_batch", lambda batch: 1 / 0)
    job = submit(engine, model, X, call(model, "grad-cam"))
    with pytest.raises(InternalError):
        job.future.result(30)
    assert isinstance(engine.died.exception(30), ZeroDivisionError)
    with pytest.raises(Unavailable):
        submit(engine, model, X, call(model, "grad-cam"))


def test_padding_is_a_choice(model: Model) -> None:
    for invariant, padding in ((True, 6), (False, 0)):
        with running(model, batch_invariant=invariant) as engine:
            submit(engine, model, X, call(model, "grad-cam")).future.result(30)
            assert engine.counters.padding == padding, "two batches of four with a row each"
