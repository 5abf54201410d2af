"""Functions of `OnHost` queries: other requests run meanwhile, and the end of a request does not wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import pytest
import torch

from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Job, Limits
from camserve_server.errors import Cancelled, Expired, InternalError, OutOfRange, Unavailable
from camserve_server.models.model import Model
from camserve_server.plan import OnHost, Plan, Predict, Randomise, WeightedLayers
from camserve_server.request_plan import _answer_once, _without_reports
from tests import nets
from tests.support import TIMEOUT_S, Clock, as_model, call, noise, running, submit

T = TypeVar("T")
X = noise(3, 32, 32)


class Blocking:
    """Function that waits for a permission. It ends after the test in any case."""

    def __init__(self) -> None:
        self.begun, self.permitted, self.ended = threading.Event(), threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.permitted.wait(TIMEOUT_S)
        self.ended.set()
        return "done"


@pytest.fixture
def model() -> Model:
    return as_model(nets.tiny_cnn())


@pytest.fixture
def blocking() -> Iterator[Blocking]:
    function = Blocking()
    yield function
    function.permitted.set()


def on_host(function: Callable[[], T]) -> Plan[T]:
    return (yield from OnHost(function))


def submit_function(engine: Engine, model: Model, function: Callable[[], T], limits: Limits | None = None) -> Job[T]:
    return engine.submit(on_host(function), model, rows=10, limits=limits or Limits())


def test_batches_of_other_requests_run_meanwhile(model: Model, blocking: Blocking) -> None:
    with running() as engine:
        job = submit_function(engine, model, blocking)
        assert blocking.begun.wait(TIMEOUT_S)
        submit(engine, model, X, call(model, "grad-cam")).future.result(TIMEOUT_S)
        assert not job.future.done()
        blocking.permitted.set()
        assert job.future.result(TIMEOUT_S) == "done"


@pytest.mark.parametrize("wrapped", [lambda plan: _answer_once(plan, {}), _without_reports], ids=["metric", "map"])
def test_answer_reaches_the_plan_between_other_queries(model: Model, wrapped: Any) -> None:
    def plan() -> Plan[tuple[int, float]]:
        first = yield from Predict(model.image(X))
        doubled = yield from OnHost(lambda: 2 * first)
        second = yield from Predict(model.image(X))
        return len(doubled), float((doubled - 2 * second).abs().max())

    with running() as engine:
        job = engine.submit(wrapped(plan()), model, rows=2)
        assert job.future.result(TIMEOUT_S) == (7, 0.0)
    assert job.rows == 2


def test_function_runs_on_its_own_thread_with_the_context_of_the_request(model: Model) -> None:
    name: ContextVar[str] = ContextVar("name")
    name.set("request 7")

    def function() -> tuple[str, bool, str]:
        return threading.current_thread().name, torch.is_grad_enabled(), name.get()

    with running() as engine:
        thread, grad, value = submit_function(engine, model, function).future.result(TIMEOUT_S)
    assert thread.startswith("host")
    assert (grad, value) == (False, "request 7")


def test_exception_is_raised_inside_the_plan(model: Model) -> None:
    def fail() -> None:
        raise OutOfRange("too large", field="budget")

    def plan() -> Plan[str]:
        try:
            yield from OnHost(fail)
        except OutOfRange as error:
            return error.message
        return "no error"

    with running() as engine:
        assert engine.submit(plan(), model, rows=1).future.result(TIMEOUT_S) == "too large"
        with pytest.raises(OutOfRange):
            submit_function(engine, model, fail).future.result(TIMEOUT_S)
        with pytest.raises(InternalError):
            submit_function(engine, model, lambda: 1 / 0).future.result(TIMEOUT_S)
        submit(engine, model, X, call(model, "grad-cam")).future.result(TIMEOUT_S)


def test_cancelled_request_ends_before_its_function(model: Model, blocking: Blocking) -> None:
    with running() as engine:
        job = submit_function(engine, model, blocking)
        assert blocking.begun.wait(TIMEOUT_S)
        engine.cancel(job)
        with pytest.raises(Cancelled):
            job.future.result(TIMEOUT_S)
        assert engine.rows_owed() == 0
        assert not blocking.ended.is_set()
        blocking.permitted.set()
        assert submit_function(engine, model, lambda: "next").future.result(TIMEOUT_S) == "next"


def test_function_of_a_cancelled_request_that_has_not_begun_is_not_called(
    monkeypatch: pytest.MonkeyPatch, model: Model, blocking: Blocking
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})  # one thread
    called = threading.Event()
    with running() as engine:
        first = submit_function(engine, model, blocking)
        assert blocking.begun.wait(TIMEOUT_S)
        waiting = submit_function(engine, model, called.set)
        engine.cancel(waiting)
        with pytest.raises(Cancelled):
            waiting.future.result(TIMEOUT_S)
        blocking.permitted.set()
        assert first.future.result(TIMEOUT_S) == "done"
        submit_function(engine, model, lambda: None).future.result(TIMEOUT_S)
        assert not called.is_set()


def test_deadline_ends_a_request_before_its_function_on_an_idle_engine(model: Model, blocking: Blocking) -> None:
    with running() as engine:
        with pytest.raises(Expired):
            submit_function(engine, model, blocking, Limits(deadline=time.monotonic() + 0.1)).future.result(TIMEOUT_S)
        assert not blocking.ended.is_set()
        assert engine.rows_owed() == 0


def test_deadline_ends_a_request_while_other_requests_run(
    monkeypatch: pytest.MonkeyPatch, model: Model, blocking: Blocking
) -> None:
    clock = Clock().install(monkeypatch)
    with running() as engine:
        job = submit_function(engine, model, blocking, Limits(deadline=clock.now_s + 1e6))
        assert blocking.begun.wait(TIMEOUT_S)
        submit(engine, model, X, call(model, "grad-cam")).future.result(TIMEOUT_S)
        assert not job.future.done()
        clock.advance(1e6)
        submit(engine, model, X, call(model, "grad-cam")).future.result(TIMEOUT_S)
        with pytest.raises(Expired):
            job.future.result(TIMEOUT_S)


@pytest.mark.parametrize("deadline", [1e12, None])
def test_distant_deadline_does_not_stop_the_engine(model: Model, blocking: Blocking, deadline: float | None) -> None:
    with running() as engine:
        job = submit_function(engine, model, blocking, Limits(deadline=deadline))
        assert blocking.begun.wait(TIMEOUT_S)
        blocking.permitted.set()
        assert job.future.result(TIMEOUT_S) == "done"


def test_engine_closes_before_a_function_has_ended(model: Model, blocking: Blocking) -> None:
    with running() as engine:
        job = submit_function(engine, model, blocking)
        assert blocking.begun.wait(TIMEOUT_S)
    assert not blocking.ended.is_set()
    with pytest.raises(Unavailable):
        job.future.result(TIMEOUT_S)
    assert engine.ended.result(TIMEOUT_S) is None


def test_random_copy_of_a_request_that_computes_is_released_at_its_end(model: Model, blocking: Blocking) -> None:
    def plan(function: Callable[[], T]) -> Plan[T]:
        layers = yield from WeightedLayers()
        yield from Randomise(layers[:1])
        return (yield from OnHost(function))

    with running(max_copies=1) as engine:
        holder = engine.submit(plan(blocking), model, rows=1)
        assert blocking.begun.wait(TIMEOUT_S)
        waiting = engine.submit(plan(lambda: "next"), model, rows=1)
        engine.cancel(holder)
        with pytest.raises(Cancelled):
            holder.future.result(TIMEOUT_S)
        blocking.permitted.set()
        assert waiting.future.result(TIMEOUT_S) == "next"
