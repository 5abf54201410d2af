"""Lanes of the kind "ascend": slots, stopping rules, and steps that are recorded as CUDA graphs on a GPU."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from torch.optim.adam import adam

from camserve_server.config import ModelConfig
from camserve_server.engine import warmup
from camserve_server.engine.lanes import ascend
from camserve_server.engine.lanes.ascend import AscendQuery, AscentLanes
from camserve_server.engine.lanes.ascent_slots import AscentSlots, Variable
from camserve_server.engine.lanes.cuda_graph import WARM_UP_CALLS
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane, run_batch, start_query
from camserve_server.engine.warmup import warm_up
from camserve_server.methods.opti_cam import Constants, Step
from camserve_server.models.load import load
from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import Ascend, Ascent
from camserve_server.rows import resize, resize_by_products
from camserve_server.torch_setup.arithmetic import gpu_arithmetic
from tests import nets
from tests.support import TIMEOUT_S, as_model, call, explained, noise, running, stopped, submit

STEP = Step("range", "raw", "mask")
OPTIONS: list[tuple[Any, Any, Any]] = [
    *itertools.product(("range", "max", "sigmoid"), ("raw", "normalised"), ("mask", "diff"))
]
SIZES: dict[LaneKind, int] = {"forward": 4, "gradient": 4, "ascend": 4}


def model_in(dtype: torch.dtype = torch.float32) -> Model:
    return as_model(nets.tiny_cnn(), dtype=dtype)


def constants(model: Model, seeds: Sequence[int]) -> Constants:
    """Return the constants of one variable for each seed, with random activations."""
    x = model.image(noise(3, 32, 32))
    count = len(seeds)
    A = torch.stack([noise(16, 8, 8, seed=seed).relu() for seed in seeds])
    images = torch.stack([noise(3, 32, 32, seed=seed) for seed in seeds])
    mean, std = (each.expand(count, -1, -1, -1) for each in (x.mean, x.std))
    A, images, mean, std = (each.to(model.device, model.dtype) for each in (A, images, mean, std))
    classes = torch.tensor([seed % 7 for seed in seeds], device=model.device)
    return Constants(A, images, mean, std, classes, noise(count).to(A))


def ascent(model: Model, *seeds: int, **changes: Any) -> Ascend[Constants]:
    """Return an ascent with one variable for each seed."""
    u0 = torch.full((len(seeds), 16), 0.5, dtype=model.dtype, device=model.device)
    query = Ascend(u0, STEP, constants(model, seeds), 6, 0.1)
    return replace(query, **changes)


def start(model: Model, query: Ascend[Any], sizes: dict[LaneKind, int] = SIZES) -> tuple[Lane, AscendQuery]:
    lane, started = start_query(query, model, sizes)
    assert isinstance(started, AscendQuery)
    return lane, started


def run_steps(model: Model, lane: Lane, *queries: tuple[AscendQuery, int], count: int = 1, size: int = 4) -> None:
    """Run the next `count` batches with one variable of each query, whose number of finished steps is given."""
    with torch.no_grad():
        for i in range(count):
            run_batch(model, lane, [BatchSlice(query, done + i, done + i + 1) for query, done in queries], size)


def finish(model: Model, query: Ascend[Any]) -> Ascent:
    """Return the answer of an ascent that runs alone."""
    lane, started = start(model, query)
    with torch.no_grad():
        for step in range(query.steps):
            run_batch(model, lane, [BatchSlice(started, step * len(query.u0), (step + 1) * len(query.u0))], 4)
    return started.answer()


# ---- bits on a CPU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Step(*options) for options in OPTIONS], ids=["-".join(each) for each in OPTIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_depend_neither_on_the_slot_nor_on_other_slots(step: Step, dtype: torch.dtype) -> None:
    model = model_in(dtype)
    alone = finish(model, ascent(model, 1, step=step))
    for slot in range(4):
        others = [start(model, ascent(model, 10 + i, step=step)) for i in range(3)]
        lane, mine = start(model, ascent(model, 1, step=step))
        queries = [each for _, each in others]
        queries.insert(slot, mine)
        model.ascents = None
        run_steps(model, lane, *((each, 0) for each in queries), count=6)
        answer = mine.answer()
        assert torch.equal(answer.u, alone.u)
        assert answer.history == alone.history


def test_variables_join_and_leave_between_steps() -> None:
    model = model_in()
    seeds = range(6)
    expected = [finish(model, ascent(model, seed)) for seed in seeds]
    started = [start(model, ascent(model, seed)) for seed in seeds]
    lane, queries = started[0][0], [each for _, each in started]
    done = [0] * 6
    model.ascents = None
    batches = [(0, 1), (2,), (1, 2, 3, 4), (5, 0), (3, 4, 5, 0), (2,), (1, 0, 3)]
    for batch in itertools.islice(itertools.cycle(batches), 60):
        members = [i for i in batch if done[i] < 6]
        if members:
            run_steps(model, lane, *((queries[i], done[i]) for i in members))
        for i in members:
            done[i] += 1
    assert done == [6] * 6
    for query, alone in zip(queries, expected, strict=True):
        assert torch.equal(query.answer().u, alone.u)


@pytest.mark.parametrize("targets", [[1], [1, 2, 3]])
def test_map_under_load_has_the_bits_of_a_single_request(targets: list[int]) -> None:
    model = model_in()
    alone = explained(model, noise(3, 32, 32), call(model, "opti-cam", steps=12), targets).maps
    with running() as engine:
        with stopped(engine):
            others = [
                submit(engine, model, noise(3, 32, 32, seed=i), call(model, "opti-cam", steps=9 + i), [i])
                for i in range(1, 6)
            ]
            job = submit(engine, model, noise(3, 32, 32), call(model, "opti-cam", steps=12), targets)
            others += [submit(engine, model, noise(3, 32, 32, seed=9), call(model, "opti-cam", steps=7), [5, 6])]
        engine.cancel(others[2])
        assert torch.equal(job.future.result(TIMEOUT_S).maps, alone)


def test_slots_have_the_alignment_and_the_strides_of_new_tensors() -> None:
    odd = torch.zeros(5, 3, 7).permute(2, 0, 1)
    variable = Variable((torch.zeros(5), torch.zeros(5), torch.zeros(5), torch.zeros(())), (odd, torch.zeros(1)))
    slots = AscentSlots(3, variable)
    for group in slots.single:
        assert group.constants[0][0].stride() == odd.stride()
        assert all(each.data_ptr() % 64 == 0 for each in (group.u, *group.constants, *group.states[0]))


# ---- lanes -----------------------------------------------------------------------------------------------------------


def test_ascents_share_a_batch_if_step_rate_and_shapes_are_equal() -> None:
    model = model_in()
    lane, _ = start(model, ascent(model, 1))
    assert start(model, ascent(model, 2, 3, steps=50, step=Step("range", "raw", "mask")))[0] == lane
    others = [
        ascent(model, 1, step=Step("max", "raw", "mask")),
        ascent(model, 1, rate=0.2),
        ascent(model, 1, constants=tuple(constants(model, [1]))),
        ascent(model, 1, u0=torch.zeros(1, 12), constants=constants(model, [1])._replace(A=torch.rand(1, 12, 8, 8))),
    ]
    assert len({lane, *(start(model, each)[0] for each in others)}) == 5


@dataclass(frozen=True)
class Enlarged:
    """Step without constants: rows of one value, the variable."""

    def rows(self, u: Tensor, of: tuple[()]) -> Tensor:
        return u[:, :1, None, None].expand(-1, 3, 32, 32)

    def objectives(self, y: Tensor, of: tuple[()]) -> Tensor:
        return y[:, 0]


@pytest.mark.parametrize("together", [False, True])
def test_step_needs_no_constants(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    monkeypatch.setattr(ascend, "computes_together", lambda model: together)
    monkeypatch.setattr(ascend, "record", recorded_in_name_only)
    answer = finish(model_in(), Ascend(torch.zeros(2, 1), Enlarged(), (), 4, 0.1))
    assert (answer.u != 0).all()
    assert torch.equal(answer.u[0], answer.u[1])


def test_few_slots_are_kept() -> None:
    model = model_in()
    lanes = [start(model, ascent(model, 1, rate=0.1 * i)) for i in range(1, 8)]
    for lane, query in lanes:
        run_steps(model, lane, (query, 0))
    assert isinstance(model.ascents, AscentLanes)
    assert len(model.ascents._slots) == ascend.KEPT_SLOTS
    expected = finish(model_in(), ascent(model, 1, rate=0.1))
    run_steps(model, lanes[0][0], (lanes[0][1], 1), count=5)
    assert torch.equal(lanes[0][1].answer().u, expected.u), "a variable continues in new slots"


def test_variable_moves_between_batch_sizes() -> None:
    model = model_in(torch.float64)
    expected = finish(model, ascent(model, 1))
    lane, query = start(model, ascent(model, 1))
    for step, size in enumerate((4, 2, 2, 4, 1, 4)):
        run_steps(model, lane, (query, step), size=size)
    torch.testing.assert_close(query.answer().u, expected.u, rtol=0, atol=1e-10)


def test_slots_do_not_keep_finished_queries() -> None:
    model = model_in()
    lane, query = start(model, ascent(model, 1))
    run_steps(model, lane, (query, 0))
    variable = weakref.ref(query.variable(0))
    del query
    gc.collect()
    assert variable() is None
    assert model.ascents is not None


def test_copies_of_a_model_have_slots_of_their_own() -> None:
    model = model_in()
    finish(model, ascent(model, 1))
    assert model.ascents is not None
    assert model.with_module(model.module).ascents is None
    assert replace(model, precision="fp32").ascents is None


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_slots_that_are_computed_together_agree_with_single_ones(
    monkeypatch: pytest.MonkeyPatch, options: tuple[Any, Any, Any]
) -> None:
    model = model_in(torch.float64)
    query = ascent(model, 1, 2, 3, step=Step(*options))
    single = finish(model, query)
    monkeypatch.setattr(ascend, "computes_together", lambda model: True)
    monkeypatch.setattr(ascend, "record", recorded_in_name_only)
    model.ascents = None
    together = finish(model, query)
    torch.testing.assert_close(together.u, single.u, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.tensor(together.history), torch.tensor(single.history), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_free_slots_stay_finite(monkeypatch: pytest.MonkeyPatch, options: tuple[Any, Any, Any]) -> None:
    monkeypatch.setattr(ascend, "computes_together", lambda model: True)
    monkeypatch.setattr(ascend, "record", recorded_in_name_only)
    model = model_in()
    query = ascent(model, 1, step=Step(*options))
    query.constants.A[0, :, 1:] = 0
    finish(model, query)
    (slots,) = model.ascents._slots.values()  # type: ignore[attr-defined]
    assert all(each.isfinite().all() for state in slots.all.states for each in state)


def test_step_that_fails_changes_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in()
    expected = finish(model, ascent(model, 1, 2))
    lane, query = start(model, ascent(model, 1, 2))

    def fails(*args: Any, **kwargs: Any) -> None:
        adam(*args, **kwargs)
        raise torch.OutOfMemoryError("no memory after the step")

    with torch.no_grad():
        for step in range(6):
            monkeypatch.setattr(ascend, "adam", fails)
            with pytest.raises(torch.OutOfMemoryError):
                run_batch(model, lane, [BatchSlice(query, 2 * step, 2 * step + 2)], 4)
            monkeypatch.setattr(ascend, "adam", adam)
            run_batch(model, lane, [BatchSlice(query, 2 * step, 2 * step + 2)], 4)
            run_batch(model, lane, [BatchSlice(query, 2 * step, 2 * step + 2)], 4)  # has no effect
    assert torch.equal(query.answer().u, expected.u)
    assert query.answer().history == expected.history


def test_stopping_rule_sees_the_objectives_at_its_steps_only() -> None:
    model = model_in()
    seen: list[Sequence[float]] = []

    def stop(history: Sequence[float]) -> bool:
        seen.append([*history])
        return len(history) == 5

    alone = finish(model, ascent(model, 1, steps=4))
    lane, query = start(model, ascent(model, 1, steps=8, stop=stop, stop_period=2))
    for step in range(8):
        run_steps(model, lane, (query, step))
        assert query.is_complete() == (step >= 4)
    assert [len(history) for history in seen] == [1, 3, 5]
    answer = query.answer()
    assert answer.history == (tuple(seen[-1]),)
    assert torch.equal(answer.u, alone.u), "no update is made at the step that ends the ascent"


def test_host_reads_no_objective_between_the_steps_of_a_stopping_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits for a GPU."""
    model = model_in()
    reads: list[int] = []
    lane, query = start(model, ascent(model, 1, steps=12, stop=lambda history: False, stop_period=5))
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        original = getattr(Tensor, name)

        def counting(tensor: Tensor, *args: Any, original: Callable[..., Any] = original) -> Any:
            reads.append(step)
            return original(tensor, *args)

        monkeypatch.setattr(Tensor, name, counting)
    for step in range(12):
        run_steps(model, lane, (query, step))
    assert {*reads} == {0, 5, 10}


@pytest.mark.parametrize("short", [(7, 7), (8, 5), (1, 3), (40, 33)])
def test_resizing_by_products_agrees_with_interpolation(short: tuple[int, int]) -> None:
    maps = noise(2, 3, *short).double()
    products = resize_by_products(maps, (32, 33))
    torch.testing.assert_close(products, resize(maps, (32, 33)), rtol=0, atol=1e-12)


# ---- recorded steps, with a stand-in for CUDA graphs -----------------------------------------------------------------


@dataclass
class Repeats:
    """In place of a CUDA graph: calls the function that was recorded."""

    function: Callable[[], Tensor]
    result: Tensor
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.result.copy_(self.function())

    def pool(self) -> str:
        return "memory"


def recorded_in_name_only(
    function: Callable[[], Tensor], device: torch.device, pool: object = None
) -> tuple[Repeats, Tensor]:
    for _ in range(WARM_UP_CALLS):
        function()
    result = function()
    return Repeats(function, result), result


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Let lanes record their steps; return the memory that each recording was given."""
    pools: list[object] = []

    def record(function: Callable[[], Tensor], device: torch.device, pool: object = None) -> tuple[Repeats, Tensor]:
        pools.append(pool)
        return recorded_in_name_only(function, device)

    monkeypatch.setattr(ascend, "computes_together", lambda model: True)
    monkeypatch.setattr(ascend, "record", record)
    return pools


def test_recorded_steps_give_the_same_maps(as_on_gpu: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests come and go, and more of them than the lane has slots."""
    model = model_in(torch.float64)

    def submitted() -> list[Tensor]:
        with running() as engine:
            with stopped(engine):
                jobs = [
                    submit(engine, model, noise(3, 32, 32, seed=i), method, [i % 7, 3][: 1 + i % 2])
                    for i in range(9)
                    for method in [call(model, "opti-cam", steps=5 + i, stop=("none", "official")[i % 2])]
                ]
            return [job.future.result(TIMEOUT_S).maps for job in jobs]

    found = submitted()
    assert as_on_gpu == [None], "one recording is enough"
    monkeypatch.undo()
    ascend.forget_slots(model)
    for recorded, plain in zip(found, submitted(), strict=True):
        torch.testing.assert_close(recorded, plain, rtol=0, atol=1e-6)


def test_recordings_share_memory_and_are_forgotten_with_it(as_on_gpu: list[object]) -> None:
    model = model_in()
    for rate in (0.1, 0.2, 0.3):
        finish(model, ascent(model, 1, rate=rate))
    assert as_on_gpu == [None, "memory", "memory"]
    ascend.forget_slots(model)
    finish(model, ascent(model, 1))
    assert as_on_gpu == [None, "memory", "memory", None]


def test_single_step_and_smaller_batch_are_not_recorded(as_on_gpu: list[object]) -> None:
    model = model_in()
    lane, query = start(model, ascent(model, 1))
    run_steps(model, lane, (query, 0))
    run_steps(model, lane, (query, 1), count=5, size=2)
    assert query.is_complete()
    assert as_on_gpu == []


@pytest.mark.parametrize("memory", [True, False], ids=["no memory", "enough memory"])
def test_steps_that_cannot_be_recorded_run_without(monkeypatch: pytest.MonkeyPatch, memory: bool) -> None:
    attempts: list[int] = []

    def fails(function: Callable[[], Tensor], device: torch.device, pool: object = None) -> Any:
        attempts.append(1)
        function()
        raise torch.OutOfMemoryError("no memory") if memory else RuntimeError("a value is read on the host")

    model = model_in(torch.float64)
    expected = [finish(model, ascent(model, 1, rate=rate)).u for rate in (0.1, 0.2)]
    monkeypatch.setattr(ascend, "computes_together", lambda model: True)
    monkeypatch.setattr(ascend, "record", fails)
    model.ascents = None
    with capture_logs() as logs:
        found = [finish(model, ascent(model, 1, rate=rate)).u for rate in (0.1, 0.2)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert len(logs) == len(attempts) == (2 if memory else 1), "more memory may be free later"
    assert logs[0]["event"] == "the steps of an ascent are not recorded as a CUDA graph"


def test_warm_up_measures_recorded_steps_and_forgets_them(as_on_gpu: list[object]) -> None:
    model = model_in()
    warm_up(model, 2)
    assert len(as_on_gpu) == 1
    assert model.batch_sizes["ascend"] == 2
    assert isinstance(model.ascents, AscentLanes)
    assert not model.ascents._slots


def test_warm_up_frees_the_memory_of_each_size_before_the_next(
    as_on_gpu: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "MEASURE_S", 0)
    monkeypatch.setitem(warmup.SIZES, "cpu", (2, 4))
    warm_up(model_in())
    assert as_on_gpu == [None, None], "no recording shares memory with that of another size"


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def on_gpu(lane_size: int) -> Model:
    config = {"name": "small", "source": "python:tests.nets:tiny_cnn", "input_size": (32, 32), "compile": False}
    model = load(ModelConfig.model_validate({**config, "precision": "fp32"}), torch.device("cuda"))
    warm_up(model, lane_size)
    return model


def recorded(model: Model) -> bool:
    return isinstance(model.ascents, AscentLanes) and all(each.graph for each in model.ascents._slots.values())


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_graph_equals_single_kernels_on_a_gpu(options: tuple[Any, Any, Any]) -> None:
    model = on_gpu(4)
    query = ascent(model, 1, 2, 3, step=Step(*options))
    with capture_logs() as logs:
        found = finish(model, query)
    assert recorded(model)
    assert logs == []
    model.ascents = AscentLanes()
    model.ascents.recordable = False
    eager = finish(model, query)
    torch.testing.assert_close(found.u, eager.u, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(found.history), torch.tensor(eager.history), rtol=0, atol=1e-4)
    double = model_in(torch.float64)
    on_cpu = finish(double, ascent(double, 1, 2, 3, step=Step(*options)))
    torch.testing.assert_close(found.u.cpu().double(), on_cpu.u, rtol=0, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("lane_size", [8, 32])
def test_concurrent_maps_equal_single_ones_on_a_gpu(lane_size: int) -> None:
    model = on_gpu(lane_size)
    images = [noise(3, 32, 32, seed=i) for i in range(32)]
    alone = [explained(model, x, call(model, "opti-cam", steps=20), [i % 7]).maps for i, x in enumerate(images)]
    with running() as engine:
        with stopped(engine):
            jobs = [submit(engine, model, x, call(model, "opti-cam", steps=20), [i % 7]) for i, x in enumerate(images)]
        found = [job.future.result(TIMEOUT_S).maps for job in jobs]
    assert recorded(model)
    assert all(map(torch.equal, found, alone))


@pytest.mark.gpu
def test_gradient_of_resizing_has_the_same_bits_each_time_on_a_gpu() -> None:
    maps = noise(8, 7, 7).cuda().requires_grad_()
    weights = noise(8, 224, 224).cuda()
    first, *others = (torch.autograd.grad((resize(maps, (224, 224)) * weights).sum(), maps)[0] for _ in range(5))
    assert all(torch.equal(first, each) for each in others)
    on_cpu = noise(8, 7, 7).requires_grad_()
    (expected,) = torch.autograd.grad((resize(on_cpu, (224, 224)) * weights.cpu()).sum(), on_cpu)
    torch.testing.assert_close(first.cpu(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_masks_are_not_rounded_to_tf32_on_a_gpu(options: tuple[Any, Any, Any]) -> None:
    """Only the network computes in TF32."""
    step, model = Step(*options), on_gpu(2)
    of = constants(model, range(2))
    u = noise(2, 16, seed=5).to(model.device)
    with gpu_arithmetic(tf32=True), torch.enable_grad():
        leaf = u.clone().requires_grad_()
        rows = step.rows(leaf, of)
        (gradient,) = torch.autograd.grad(rows.square().sum(), leaf)
    exact_of = Constants(*(each.double() if each.is_floating_point() else each for each in of))
    with torch.enable_grad():
        exact = u.double().requires_grad_()
        expected = step.rows(exact, exact_of)
        (expected_gradient,) = torch.autograd.grad(expected.square().sum(), exact)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=2e-5)
    most = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=1e-5 * most)


@pytest.mark.gpu
def test_network_whose_steps_cannot_be_recorded_is_served_on_a_gpu() -> None:
    source = "python:tests.server.engine.test_fast_forward:ReadsActivations"
    config = {"name": "small", "source": source, "input_size": (32, 32), "precision": "fp32", "compile": False}
    with capture_logs() as logs:
        model = load(ModelConfig.model_validate(config), torch.device("cuda"))
        warm_up(model, 4)
        found = explained(model, noise(3, 32, 32), call(model, "opti-cam", ["net.r3"], steps=3), [1]).maps
    events = [log["event"] for log in logs]
    assert events.count("the steps of an ascent are not recorded as a CUDA graph") == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert found.isfinite().all()
