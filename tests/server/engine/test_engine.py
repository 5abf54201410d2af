"""Failures in the engine: a failure affects only the request that it belongs to."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.engine import batch_loop, batch_runner, steps
from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Event, Progress
from camserve_server.engine.lanes import ascend, gradient
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane, run_batch
from camserve_server.engine.lanes.forward import ScoreQuery
from camserve_server.engine.lanes.lane_query import RowSum
from camserve_server.engine.scheduler import Scheduler
from camserve_server.errors import Cancelled, Expired, InternalError, OutOfMemory, QueueFull, Unavailable
from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import MapWarning, Plan, Predict, Score, Scores, Sum, Targets
from camserve_server.request_plan import plan_request
from camserve_server.rows import Repeated
from tests import nets
from tests.support import TIMEOUT_S, Clock, as_model, call, explained, metric, noise, running, submit

X = noise(3, 32, 32)


@pytest.fixture
def model() -> Model:
    return as_model(nets.tiny_cnn())


def limit_batch_size(monkeypatch: pytest.MonkeyPatch, max_rows: int) -> None:
    """Make batches of more than `max_rows` rows run out of memory."""

    def limited(model: Model, lane: Lane, slices: Sequence[BatchSlice], size: int) -> None:
        if size > max_rows:
            raise torch.OutOfMemoryError("no memory")
        run_batch(model, lane, slices, size)

    monkeypatch.setattr(batch_runner, "run_batch", limited)


@pytest.mark.parametrize("method", ["poly-cam", "opti-cam", "grad-cam"])
def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch, model: Model, method: str) -> None:
    parameters: dict[str, Any] = {"steps": 10} if method == "opti-cam" else {}
    with running() as engine:
        plain = submit(engine, model, X, call(model, method, **parameters), [1, 2, 3]).future.result(TIMEOUT_S)
        rows = engine.counters.rows
        limit_batch_size(monkeypatch, 1)
        tight = submit(engine, model, X, call(model, method, **parameters), [1, 2, 3]).future.result(TIMEOUT_S)
        assert engine.counters.rows == 2 * rows, "each row must run exactly once"
    assert model.batch_sizes["forward"] == 1
    assert torch.allclose(plain.maps, tight.maps, atol=1e-3)


def test_lack_of_memory_while_another_gpu_has_failed(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    """torch returns the cached memory of all GPUs, and raises the error of the failed one."""

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(batch_runner, "empty_cache", fail)
    with running() as engine:
        limit_batch_size(monkeypatch, 2)
        submit(engine, model, X, call(model, "score-cam"), [1]).future.result(TIMEOUT_S)
    assert model.batch_sizes["forward"] == 2


@pytest.mark.parametrize("requested", [None, {"forward": 4, "gradient": 4}])
def test_job_records_the_batch_sizes_that_it_ran_with(
    monkeypatch: pytest.MonkeyPatch, model: Model, requested: dict[LaneKind, int] | None
) -> None:
    events: list[Event] = []
    with running() as engine:
        limit_batch_size(monkeypatch, 2)
        x, subject = model.image(X), call(model, "grad-cam")
        halved = engine.submit(
            plan_request(model, x, [1], subject, ()), model, rows=2, batch_sizes=requested, notify=events.append
        )
        halved.future.result(TIMEOUT_S)
        after = submit(engine, model, X, call(model, "grad-cam"), [1], batch_sizes=requested)
        after.future.result(TIMEOUT_S)
    for job in (halved, after):
        assert (job.batch_sizes["forward"], job.batch_sizes["gradient"]) == (2, 2)
    assert [event.text for event in events if isinstance(event, MapWarning)] == [
        "memory ran out; later batches have 2 rows; a replay may therefore give different bits"
    ], "only the first job had run rows before the batch size changed"


class OneRowOfMemory(nn.Module):
    """Network that runs out of memory for batches of more than one row.

    It counts the tensors of earlier batches that are alive when a batch arrives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()
        self.tensors: list[weakref.ref[Tensor]] = []
        self.full = False
        self.alive: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net.r1(self.net.c1(x))
        if self.full:
            self.alive.append(sum(tensor() is not None for tensor in self.tensors))
            self.tensors += [weakref.ref(x), weakref.ref(y)]
            if len(x) > 1:
                raise torch.OutOfMemoryError("no memory")
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["grad-cam", "score-cam", "opti-cam"])
def test_batch_that_does_not_fit_is_freed_before_its_halves_run(method: str) -> None:
    model = as_model(OneRowOfMemory())
    assert isinstance(model.module, OneRowOfMemory)
    model.module.full = True
    with running() as engine:
        submit(engine, model, X, call(model, method, ["net.r3"])).future.result(TIMEOUT_S)
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
def test_batch_that_runs_out_of_memory_after_the_forward_pass_is_run_again(
    monkeypatch: pytest.MonkeyPatch, model: Model, owner: Any, name: str, method: str
) -> None:
    """Each row counts once, whether the failure comes before or after its result has been stored."""
    shorter: dict[str, dict[str, Any]] = {
        "rise": {"masks": 40},
        "smooth-grad": {"samples": 10},
        "opti-cam": {"steps": 10},
    }
    parameters = shorter.get(method, {})
    sizes: dict[LaneKind, int] = {"forward": 8, "gradient": 8, "ascend": 8}
    plain = explained(model, X, call(model, method, None, **parameters), [1, 2])
    calls, original = 0, getattr(owner, name)

    def fails_twice(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("no memory before the call")
        result = original(*args, **kwargs)
        if calls == 4 and owner not in (gradient, ascend):  # these calls are the last that need memory
            raise torch.OutOfMemoryError("no memory after the call")
        return result

    monkeypatch.setattr(owner, name, fails_twice)
    tight = explained(model, X, call(model, method, None, **parameters), [1, 2], batch_sizes=sizes)
    assert calls >= 4
    assert tight.share == 1
    assert torch.allclose(plain.maps, tight.maps, atol=1e-3)


def plan_with_a_bug_in_a_term(model: Model) -> Plan[None]:
    def term(i: int, scores: Scores) -> Tensor:
        if i == 1:
            raise ValueError("a bug in a term")
        return scores.logits

    x, none = model.image(X), torch.zeros(1, dtype=torch.float64)
    yield from Sum(Score(Repeated(x, 8), Targets((1,), none, none)), term)


def test_request_fails_if_one_row_does_not_fit(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    with running() as engine:
        limit_batch_size(monkeypatch, 0)
        with pytest.raises(OutOfMemory):
            submit(engine, model, X, call(model, "grad-cam")).future.result(TIMEOUT_S)


def plan_with_a_bug(model: Model) -> Plan[None]:
    yield from Predict(model.image(X))
    raise ValueError("a bug in a method")


def plan_that_leaves_grad_mode_on(model: Model) -> Plan[None]:
    torch.set_grad_enabled(True)
    yield from Predict(model.image(X))


def plan_with_a_wrong_row(model: Model) -> Plan[None]:
    """Yield a row with too many channels, which fails the batch that contains it."""
    yield from Predict(model.image(noise(5, 32, 32)[:, :32, :32]))


def plan_without_memory(model: Model) -> Plan[None]:
    yield from Predict(model.image(X))
    raise torch.OutOfMemoryError("no memory")


def test_plan_that_runs_out_of_memory_fails_with_out_of_memory(model: Model) -> None:
    with running() as engine, pytest.raises(OutOfMemory):
        engine.submit(plan_without_memory(model), model, rows=1).future.result(TIMEOUT_S)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [plan_with_a_bug, plan_that_leaves_grad_mode_on, plan_with_a_wrong_row, plan_with_a_bug_in_a_term]
)
def test_failing_plan_does_not_affect_other_requests(model: Model, plan: Any) -> None:
    with running() as engine:
        alone = submit(engine, model, X, call(model, "poly-cam")).future.result(TIMEOUT_S)
        good = [submit(engine, model, X, call(model, "poly-cam")) for _ in range(3)]
        bad = [engine.submit(plan(model), model, rows=1) for _ in range(3)]
        for job in bad:
            with pytest.raises(InternalError) as caught:
                job.future.result(TIMEOUT_S)
            assert "bug" not in caught.value.message
        for job in good:
            assert torch.equal(job.future.result(TIMEOUT_S).maps, alone.maps)


def test_deadline_cancellation_and_close_end_requests(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    clock = Clock().install(monkeypatch)
    engine = Engine(max_rows_owed=10_000_000)
    engine.start()
    long = call(model, "rise", masks=1_000_000)
    late = submit(engine, model, X, long, deadline=time.monotonic() + 1)
    cancelled = submit(engine, model, X, long)
    unfinished = submit(engine, model, X, long)
    engine.cancel(cancelled)
    with pytest.raises(Cancelled):
        cancelled.future.result(TIMEOUT_S)
    assert not late.future.done()
    clock.advance(2)
    with pytest.raises(Expired):
        late.future.result(TIMEOUT_S)
    assert 0 < engine.rows_owed() <= 1_000_001, "only the third request still owes rows"
    engine.close()
    with pytest.raises(Unavailable):
        unfinished.future.result(TIMEOUT_S)
    with pytest.raises(Unavailable):
        submit(engine, model, X, long)
    assert engine.rows_owed() == 0
    assert engine.ended.result(TIMEOUT_S) is None


def test_engine_that_breaks_fails_all_requests(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    engine = Engine()
    engine.start()
    monkeypatch.setattr(Scheduler, "next_batch", lambda scheduler: 1 / 0)
    job = submit(engine, model, X, call(model, "grad-cam"))
    with pytest.raises(InternalError):
        job.future.result(TIMEOUT_S)
    assert isinstance(engine.ended.exception(TIMEOUT_S), ZeroDivisionError)
    with pytest.raises(Unavailable):
        submit(engine, model, X, call(model, "grad-cam"))


def test_progress_of_a_request_with_a_budget_ends_at_the_budget(model: Model) -> None:
    """The budget shortens the method; the metrics after it still get all their rows."""
    events: list[Event] = []
    metrics = [metric("insertion", steps=20)]
    with running() as engine:
        job = submit(engine, model, X, call(model, "rise", masks=400), [1], metrics, events, budget=100)
        job.future.result(TIMEOUT_S)
    progress = [event for event in events if isinstance(event, Progress)]
    assert {event.rows_total for event in progress} == {100} == {job.rows}
    assert [event.rows_done for event in progress].count(100) == 1


def test_long_request_does_not_block_short_requests(model: Model) -> None:
    with running(max_rows_owed=1000) as engine:
        long = submit(engine, model, X, call(model, "rise", masks=1_000_000))
        submit(engine, model, X, call(model, "grad-cam")).future.result(TIMEOUT_S)
        with pytest.raises(QueueFull, match="1000") as caught:
            submit(engine, model, X, call(model, "rise", masks=900_000))
        assert caught.value.retry_after_s is not None
        assert 1 <= caught.value.retry_after_s <= 60, "the long request may be cancelled at any time"
        submit(engine, model, X, call(model, "rise", masks=900_000), budget=100).future.result(TIMEOUT_S)
        engine.cancel(long)


def test_batches_of_requests_run_between_steps(model: Model) -> None:
    with running() as engine:
        batches = []

        def steps() -> Iterator[None]:
            for _ in range(20):
                batches.append(engine.counters.batches)
                yield

        long = submit(engine, model, X, call(model, "rise", masks=1_000_000))
        while not engine.counters.batches:
            time.sleep(0.001)
        engine.run_between_batches(steps()).result(TIMEOUT_S)
        engine.cancel(long)
        assert batches == sorted(set(batches)), "at least one batch must run between two steps"


def test_steps_that_fail_or_do_not_end_raise_from_their_future() -> None:
    def broken() -> Iterator[None]:
        yield
        raise OutOfMemory("no memory")

    def endless() -> Iterator[None]:
        while True:
            yield

    with running() as engine:
        with pytest.raises(OutOfMemory):
            engine.run_between_batches(broken()).result(TIMEOUT_S)
        unfinished = engine.run_between_batches(endless())
    with pytest.raises(Unavailable):
        unfinished.result(TIMEOUT_S)


class Timed(nn.Module):
    """Network whose forward pass advances a clock."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock.advance(self.seconds)
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_slow_model_does_not_shorten_requests_of_a_fast_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is cut short before its deadline by the time of one batch of its own lane."""
    clock = Clock().install(monkeypatch)
    slow, fast = (as_model(Timed(clock, s), name=name) for name, s in (("slow", 3.0), ("fast", 0.01)))
    fast.throughput["forward"].observe(1000, 1.0)
    with running() as engine:
        submit(engine, slow, X, call(slow, "fake-cam")).future.result(TIMEOUT_S)
        begun = time.monotonic()
        job = submit(engine, fast, X, call(fast, "rise", masks=1_000_000), deadline=begun + 3.0)
        assert job.future.result(TIMEOUT_S).share < 1
        assert 2.5 < time.monotonic() - begun < 2.8, "the method may use nine tenths of the time"


def test_padding_can_be_switched_off(model: Model) -> None:
    for invariant, padding in ((True, 6), (False, 0)):
        with running(batch_invariant=invariant) as engine:
            submit(engine, model, X, call(model, "grad-cam")).future.result(TIMEOUT_S)
            assert engine.counters.padding == padding, "there are two batches of four with one row each"


def break_device(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    """Let a function of a module raise the error of a broken GPU."""

    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(module, name, broken)


def failing_steps() -> Iterator[None]:
    yield
    raise ValueError("a step failed")


def test_step_that_breaks_the_device_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    break_device(monkeypatch, steps, "check_device")
    with running() as engine:
        assert isinstance(engine.run_between_batches(failing_steps()).exception(TIMEOUT_S), Unavailable)
        assert "illegal memory access" in str(engine.ended.exception(TIMEOUT_S))
        assert not engine.working


def test_step_that_fails_on_a_device_that_works_does_not_end_the_engine() -> None:
    with running() as engine:
        assert isinstance(engine.run_between_batches(failing_steps()).exception(TIMEOUT_S), ValueError)
        assert engine.working


def test_device_that_cannot_be_used_ends_the_engine(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    break_device(monkeypatch, batch_loop, "use_device")
    engine = Engine()
    waiting = engine.run_between_batches(failing_steps())
    job = submit(engine, model, X, call(model, "grad-cam"), 1)
    engine.start()
    try:
        assert isinstance(job.future.exception(TIMEOUT_S), InternalError)
        assert isinstance(waiting.exception(TIMEOUT_S), Unavailable)
        assert "illegal memory access" in str(engine.ended.exception(TIMEOUT_S))
        assert not engine.working
    finally:
        engine.close()
