"""The engine when things go wrong: a failure stays with the request that it belongs to."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.engine import batch_runner as runner_module
from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Event, Progress
from camserve_server.engine.lanes import ascend, gradient
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane
from camserve_server.engine.lanes.forward import ScoreQuery
from camserve_server.engine.lanes.lane_query import RowSum
from camserve_server.errors import Cancelled, Expired, InternalError, OutOfMemory, QueueFull, Unavailable
from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import MapWarning, Plan, Predict, Score, Scores, Sum, Targets
from camserve_server.request_plan import plan_request
from camserve_server.rows import Repeated
from tests import nets
from tests.support import as_model, call, explained, metric, noise, running, submit

X = noise(3, 32, 32)


@pytest.fixture
def model() -> Model:
    return as_model(nets.tiny_cnn())


def limited(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """A device without room for more than `largest` rows."""
    run = runner_module.run_batch

    def small(model: Model, lane: Lane, slices: Sequence[BatchSlice], size: int) -> None:
        if size > largest:
            raise torch.OutOfMemoryError("no room")
        run(model, lane, slices, size)

    monkeypatch.setattr(runner_module, "run_batch", small)


@pytest.mark.parametrize("method", ["poly-cam", "opti-cam", "grad-cam"])
def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch, model: Model, method: str) -> None:
    parameters: dict[str, object] = {"steps": 10} if method == "opti-cam" else {}
    with running() as engine:
        plain = submit(engine, model, X, call(model, method, **parameters), [1, 2, 3]).future.result(60)
        rows = engine.counters.rows
        limited(monkeypatch, 1)
        tight = submit(engine, model, X, call(model, method, **parameters), [1, 2, 3]).future.result(60)
        assert engine.counters.rows == 2 * rows, "no row is lost or done twice"
    assert model.batch_sizes["forward"] == 1
    assert torch.allclose(plain.maps, tight.maps, atol=1e-3)


@pytest.mark.parametrize("given", [None, {"forward": 4, "gradient": 4}])
def test_the_batch_sizes_of_a_job_are_those_that_it_ran_at(
    monkeypatch: pytest.MonkeyPatch, model: Model, given: dict[LaneKind, int] | None
) -> None:
    events: list[Event] = []
    with running() as engine:
        limited(monkeypatch, 2)
        x, subject = model.image(X), call(model, "grad-cam")
        halved = engine.submit(
            plan_request(model, x, [1], subject, ()), model, rows=2, batch_sizes=given, notify=events.append
        )
        halved.future.result(60)
        after = submit(engine, model, X, call(model, "grad-cam"), [1], batch_sizes=given)
        after.future.result(60)
    for job in (halved, after):
        assert (job.batch_sizes["forward"], job.batch_sizes["gradient"]) == (2, 2)
    assert [event.text for event in events if isinstance(event, MapWarning)] == [
        "memory ran out; later batches have 2 rows, so that a replay may give other bits"
    ], "its first row had run at 4"


class Hungry(nn.Module):
    """Has room for one row; notes whether anything of an earlier batch is alive when the next one comes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()
        self.seen: list[weakref.ref[Tensor]] = []
        self.full = False
        self.alive: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net.r1(self.net.c1(x))
        if self.full:
            self.alive.append(sum(seen() is not None for seen in self.seen))
            self.seen += [weakref.ref(x), weakref.ref(y)]
            if len(x) > 1:
                raise torch.OutOfMemoryError("no room")
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["grad-cam", "score-cam", "opti-cam"])
def test_a_batch_that_did_not_fit_is_gone_before_its_halves_are_run(method: str) -> None:
    model = as_model(Hungry())
    assert isinstance(model.module, Hungry)
    model.module.full = True
    with running() as engine:
        submit(engine, model, X, call(model, method, ["net.r3"])).future.result(60)
    assert len(model.module.alive) > 3
    assert not any(model.module.alive)


@pytest.mark.parametrize(
    ("owner", "name", "method"),
    [
        (RowSum, "add", "rise"),
        (RowSum, "add", "smooth-grad"),
        (ScoreQuery, "store_logits", "score-cam"),
        (gradient, "detached_copies", "grad-cam"),
        (ascend, "adam", "opti-cam"),
    ],
    ids=["forward sum", "gradient sum", "scores", "gradients", "ascent"],
)
def test_what_runs_out_of_memory_behind_the_network_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, model: Model, owner: Any, name: str, method: str
) -> None:
    """No row is lost, and none counts twice, whether it failed before its answer was kept or after."""
    parameters = {"rise": {"masks": 40}, "smooth-grad": {"samples": 10}, "opti-cam": {"steps": 10}}.get(method, {})
    sizes: dict[LaneKind, int] = {"forward": 8, "gradient": 8, "ascend": 8}
    plain, calls, works = explained(model, X, call(model, method, None, **parameters), [1, 2]), 0, getattr(owner, name)

    def fails_twice(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("no room before")
        done = works(*args, **kwargs)
        if calls == 4 and owner not in (gradient, ascend):  # behind these nothing needs memory
            raise torch.OutOfMemoryError("no room after")
        return done

    monkeypatch.setattr(owner, name, fails_twice)
    tight = explained(model, X, call(model, method, None, **parameters), [1, 2], batch_sizes=sizes)
    assert calls >= 4
    assert tight.share == 1
    assert torch.allclose(plain.maps, tight.maps, atol=1e-3)


def bug_in_a_term(model: Model) -> Plan[None]:
    def term(i: int, scores: Scores) -> Tensor:
        if i == 1:
            raise ValueError("a bug in a term")
        return scores.logits

    x, none = model.image(X), torch.zeros(1, dtype=torch.float64)
    yield from Sum(Score(Repeated(x, 8), Targets((1,), none, none)), term)


def test_not_even_one_row_fits(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    with running() as engine:
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


def no_room(model: Model) -> Plan[None]:
    yield from Predict(model.image(X))
    raise torch.OutOfMemoryError("no room")


def test_a_plan_that_runs_out_of_memory_says_so(model: Model) -> None:
    with running() as engine, pytest.raises(OutOfMemory):
        engine.submit(no_room(model), model, rows=1).future.result(60)


@pytest.mark.parametrize("plan", [broken, grad_mode_left_on, wrong_row, bug_in_a_term])
def test_a_plan_that_fails_fails_alone(model: Model, plan: Any) -> None:
    with running() as engine:
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
    engine = Engine()
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
    engine = Engine()
    engine.start()
    monkeypatch.setattr(engine, "_run_batch", lambda batch: 1 / 0)
    job = submit(engine, model, X, call(model, "grad-cam"))
    with pytest.raises(InternalError):
        job.future.result(30)
    assert isinstance(engine.died.exception(30), ZeroDivisionError)
    with pytest.raises(Unavailable):
        submit(engine, model, X, call(model, "grad-cam"))


def test_the_progress_of_a_request_with_a_budget_ends_when_it_does(model: Model) -> None:
    """What a budget cuts off a method is not taken off what the metrics after it need."""
    events: list[Event] = []
    metrics = [metric("insertion", steps=20)]
    with running() as engine:
        job = submit(engine, model, X, call(model, "rise", masks=400), [1], metrics, events, budget=100)
        job.future.result(60)
    progress = [event for event in events if isinstance(event, Progress)]
    assert {event.rows_total for event in progress} == {100} == {job.rows}
    assert [event.rows_done for event in progress].count(100) == 1


def test_a_long_request_shuts_no_short_one_out(model: Model) -> None:
    with running(max_rows_owed=1000) as engine:
        long = submit(engine, model, X, call(model, "rise", masks=1_000_000))
        submit(engine, model, X, call(model, "grad-cam")).future.result(60)
        with pytest.raises(QueueFull, match="1000") as caught:
            submit(engine, model, X, call(model, "rise", masks=900_000))
        assert 1 <= caught.value.retry_after_s <= 60, "the long one may be cancelled at any time"
        submit(engine, model, X, call(model, "rise", masks=900_000), budget=100).future.result(60)
        engine.cancel(long)


def test_steps_let_the_batches_of_others_run_between_them(model: Model) -> None:
    with running() as engine:
        seen = []

        def steps() -> Iterator[None]:
            for _ in range(20):
                seen.append(engine.counters.batches)
                yield

        long = submit(engine, model, X, call(model, "rise", masks=1_000_000))
        while not engine.counters.batches:
            time.sleep(0.001)
        engine.run_between_batches(steps()).result(60)
        engine.cancel(long)
        assert seen == sorted(set(seen)), "at least a batch between any two"


def test_steps_that_fail_or_are_left_say_so() -> None:
    def broken() -> Iterator[None]:
        yield
        raise OutOfMemory("no room")

    def endless() -> Iterator[None]:
        while True:
            yield

    with running() as engine:
        with pytest.raises(OutOfMemory):
            engine.run_between_batches(broken()).result(60)
        left = engine.run_between_batches(endless())
    with pytest.raises(Unavailable):
        left.result(60)


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()
        self.wait_s = 0.0

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.wait_s)
        return self.net(x)  # type: ignore[no-any-return]


def test_a_slow_network_cuts_short_no_request_of_another() -> None:
    slow, fast = as_model(Slow(), name="slow"), as_model(nets.tiny_cnn(), name="fast")
    assert isinstance(slow.module, Slow)
    slow.module.wait_s = 3.0
    fast.rows_per_s["forward"] = 1000
    with running() as engine:
        submit(engine, slow, X, call(slow, "fake-cam")).future.result(30)
        begun = time.monotonic()
        cut = submit(engine, fast, X, call(fast, "rise", masks=1_000_000), deadline=begun + 3.0).future.result(30)
        assert cut.share < 1
        assert time.monotonic() - begun > 1.5, "it used its time"


def test_padding_is_a_choice(model: Model) -> None:
    for invariant, padding in ((True, 6), (False, 0)):
        with running(batch_invariant=invariant) as engine:
            submit(engine, model, X, call(model, "grad-cam")).future.result(30)
            assert engine.counters.padding == padding, "two batches of four with a row each"
