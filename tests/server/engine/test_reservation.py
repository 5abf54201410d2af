"""Reservations of the engine: rows that count as owed before a plan is submitted."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from camserve_server.engine.admission import Caller
from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Limits
from camserve_server.engine.scheduler import Scheduler
from camserve_server.errors import Expired, InternalError, QueueFull, Unavailable
from camserve_server.models.model import Model
from camserve_server.plan import Plan, Predict
from tests import nets
from tests.support import TIMEOUT_S, as_model, noise, running


@pytest.fixture(scope="module")
def model() -> Model:
    return as_model(nets.tiny_cnn())


def predict(model: Model) -> Plan[torch.Tensor]:
    return (yield from Predict(model.image(noise(3, 32, 32))))


def test_reserved_rows_count_as_owed_until_the_context_ends() -> None:
    engine = Engine(max_rows_owed=100)
    with engine.reserve(80):
        assert engine.rows_owed() == 80
        with pytest.raises(QueueFull), engine.reserve(80):
            pass
        assert engine.rows_owed() == 80, "the refused request owes nothing"
    assert engine.rows_owed() == 0
    with engine.reserve(80):
        assert engine.rows_owed() == 80


def test_reserved_rows_count_for_the_quota_of_the_caller() -> None:
    engine, caller = Engine(), Caller("one", 100)
    with engine.reserve(80, caller=caller):
        with pytest.raises(QueueFull) as caught, engine.reserve(30, caller=caller):
            pass
        assert caught.value.reason == "QUOTA_EXCEEDED"
        with engine.reserve(30, caller=Caller("other", 100)):
            assert engine.rows_owed() == 110


def test_a_budget_bounds_the_reserved_rows() -> None:
    engine = Engine()
    with engine.reserve(1000, Limits(budget=30)):
        assert engine.rows_owed() == 30


def test_an_error_releases_the_reservation() -> None:
    engine = Engine()
    with pytest.raises(ZeroDivisionError), engine.reserve(80):
        raise ZeroDivisionError
    assert engine.rows_owed() == 0


def test_a_submitted_job_keeps_the_reserved_rows_until_it_ends(model: Model) -> None:
    engine = Engine()
    with engine.reserve(1) as reservation:
        job = reservation.submit(predict(model), model)
    assert engine.rows_owed() == 1
    engine.start()
    assert job.future.result(TIMEOUT_S).shape == (model.classes,)
    assert engine.rows_owed() == 0
    engine.close()


def test_the_deadline_is_checked_at_the_reservation_and_not_again(model: Model) -> None:
    engine = Engine()
    limits = Limits(deadline=time.monotonic() + 150, least=100, rows_per_s=1)
    with engine.reserve(100, limits) as reservation, engine.reserve(100):
        with pytest.raises(Expired), engine.reserve(100, limits):
            pass
        job = reservation.submit(predict(model), model)
    engine.start()
    job.future.result(TIMEOUT_S)
    engine.close()


def test_a_closed_engine_refuses_a_plan_under_an_earlier_reservation(model: Model) -> None:
    with running() as engine:
        with engine.reserve(1) as reservation:
            engine.close()
            with pytest.raises(Unavailable):
                reservation.submit(predict(model), model)
            assert engine.rows_owed() == 1
        assert engine.rows_owed() == 0


def test_a_reservation_serves_one_plan_while_it_is_open(model: Model) -> None:
    with running() as engine:
        with engine.reserve(1) as reservation:
            job = reservation.submit(predict(model), model)
            with pytest.raises(RuntimeError, match="already belongs to a job"):
                reservation.submit(predict(model), model)
        job.future.result(TIMEOUT_S)
        with engine.reserve(1) as unused:
            pass
        with pytest.raises(RuntimeError, match="has ended"):
            unused.submit(predict(model), model)
        assert engine.rows_owed() == 0


def test_a_failing_engine_fails_jobs_that_it_has_not_begun(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    engine = Engine()
    job = engine.submit(predict(model), model, rows=1)
    monkeypatch.setattr(Scheduler, "__len__", lambda scheduler: 1 / 0)
    engine.start()
    with pytest.raises(InternalError):
        job.future.result(TIMEOUT_S)
    assert isinstance(engine.ended.exception(TIMEOUT_S), ZeroDivisionError)
    assert engine.rows_owed() == 0


def test_a_closed_engine_refuses_steps_between_batches() -> None:
    def steps() -> Iterator[None]:
        yield

    with running() as engine:
        pass
    with pytest.raises(Unavailable):
        engine.run_between_batches(steps()).result(TIMEOUT_S)
