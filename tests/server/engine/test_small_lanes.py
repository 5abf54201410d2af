"""Queries with few rows have lanes with small batches, where a batch cannot become smaller without a change of bits."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.engine import batch_runner, warmup
from camserve_server.engine.job import Job
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane, merged_sizes, run_batch, start_query
from camserve_server.engine.warmup import measure_steps, warm_up, warm_up_steps
from camserve_server.models.copies import copied
from camserve_server.models.load import load
from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import Ascend, Gradient, Predict, Query, Score, Sum, Targets
from camserve_server.request_plan import MethodCall, limits, rows_needed
from camserve_server.request_result import RequestResult
from camserve_server.rows import Repeated
from tests import nets
from tests.support import TIMEOUT_S, as_model, call, explained, noise, running, stopped, submit

X = noise(3, 32, 32)
RATES = {1: 1.0, 2: 5.0, 4: 7.0, 8: 10.0, 16: 10.0}  # rows per second by batch size
MEASURED: dict[LaneKind, int] = {"forward": 8, "gradient": 8, "ascend": 4, "forward-small": 2, "gradient-small": 2}
WITHOUT: dict[LaneKind, int] = {"forward": 8, "gradient": 8, "ascend": 4}
SIZES: dict[LaneKind, int] = {"forward": 4, "gradient": 4, "ascend": 4, "forward-small": 2, "gradient-small": 3}


class BySize(nn.Module):
    """Network in which the rows of batches below `full` rows have other bits, so that no smaller batch can be used."""

    def __init__(self, full: int = 8, gradients_only: bool = False) -> None:
        super().__init__()
        self.net, self.full, self.gradients_only = nets.tiny_cnn(), full, gradients_only

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < self.full and (x.requires_grad or not self.gradients_only):
            x = x * (1 + 1e-3 / len(x))
        return self.net(x)  # type: ignore[no-any-return]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let batches have the throughput of `RATES`. Return a list that receives the sizes of the measured batches."""
    sizes: list[int] = []

    def seconds(model: Model, query: object, at_least_s: float, size: int) -> Generator[None, None, float]:
        yield
        sizes.append(size)
        return size / RATES[size]

    monkeypatch.setattr(warmup, "_batch_seconds", seconds)
    return sizes


# ---- measured sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (BySize, MEASURED),
        (nets.tiny_cnn, WITHOUT),
        (lambda: BySize(gradients_only=True), {**WITHOUT, "gradient-small": 2}),
    ],
    ids=["other bits", "same bits", "other gradients"],
)
def test_lanes_are_small_where_smaller_batches_give_other_bits(
    timed: list[int], network: Callable[[], nn.Module], expected: Mapping[LaneKind, int]
) -> None:
    model = as_model(network())
    warm_up(model)
    assert model.batch_sizes == expected
    assert {kind: model.throughput[kind].average for kind in expected} == {
        kind: RATES[size] for kind, size in expected.items()
    }


def test_later_measurement_includes_small_lanes(timed: list[int]) -> None:
    """The next load compares the bits of these sizes."""
    model, sizes = as_model(nets.tiny_cnn()), dict[LaneKind, int]()
    warm_up(model)
    assert len(list(measure_steps(model, {}, sizes))) == 3 * 5, "it yields before each size of each kind of passes"
    assert (sizes, model.batch_sizes) == (MEASURED, WITHOUT)


@pytest.mark.parametrize(
    ("known", "expected", "ran"),
    [
        (MEASURED, MEASURED, [8, 2, 8, 2, 4]),
        (WITHOUT, WITHOUT, [8, 8, 4]),
        ({**WITHOUT, "forward-small": 8, "gradient-small": 16}, WITHOUT, [8, 8, 4]),
        ({"forward": 8, "gradient-small": 1}, {**WITHOUT, "gradient-small": 2}, [8, 1, 2, 4, 8, 16, 1, 2, 4, 8, 16]),
    ],
    ids=["all", "none", "not small", "some"],
)
def test_known_sizes_are_warmed_up_and_not_measured(
    timed: list[int], known: Mapping[LaneKind, int], expected: Mapping[LaneKind, int], ran: list[int]
) -> None:
    model = as_model(BySize())
    model.batch_sizes.clear()
    for _ in warm_up_steps(model, known):
        pass
    assert (model.batch_sizes, timed) == (expected, ran)


def test_configured_size_applies_to_all_lanes(timed: list[int]) -> None:
    model = as_model(BySize())
    warm_up(model, 8)
    assert model.batch_sizes == {"forward": 8, "gradient": 8, "ascend": 8}


def test_network_without_gradients_has_no_small_lane_for_them(
    timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, measured = as_model(BySize()), warmup._measure_kind

    def failing(model: Model, kind: Any, *arguments: Any) -> Any:
        if kind == "gradient":
            raise RuntimeError("no gradients")
        return measured(model, kind, *arguments)

    monkeypatch.setattr(warmup, "_measure_kind", failing)
    warm_up(model)
    assert model.unavailable == {"gradient": "RuntimeError: no gradients"}
    assert model.batch_sizes == {"forward": 8, "forward-small": 2, "gradient": 8, "ascend": 4}


def test_network_for_single_rows_has_no_small_lane(timed: list[int]) -> None:
    model = as_model(BySize())
    model.one_row = True
    warm_up(model)
    assert model.batch_sizes == {"forward": 1, "gradient": 1, "ascend": 1}


def test_gradients_of_single_rows_are_not_computed_on_a_cpu(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch computes wrong gradients of batch norms for some of them."""
    monkeypatch.setitem(RATES, 1, 5.0)
    model = as_model(BySize())
    warm_up(model)
    assert model.batch_sizes == {**MEASURED, "forward-small": 1}


def test_copies_on_other_devices_share_the_sizes(timed: list[int]) -> None:
    model = as_model(BySize())
    copy = copied(model, torch.device("cpu"), "cpu:1")
    warm_up(model)
    timed.clear()
    for _ in warm_up_steps(copy, {**copy.batch_sizes}):
        pass
    assert copy.batch_sizes is model.batch_sizes
    assert (model.batch_sizes, timed) == (MEASURED, [8, 2, 8, 2, 4])


# ---- choice of the lane ----------------------------------------------------------------------------------------------


def rows_of(model: Model, rows: int) -> tuple[Score, Gradient]:
    x = model.image(X)
    c = Targets((0,), torch.zeros(1).double(), torch.zeros(1).double())
    return Score(Repeated(x, rows), c), Gradient(Repeated(x, rows), [0] * rows, ("r3",))


def kind_of(query: Query[Any], model: Model, **options: Any) -> LaneKind:
    lane, _ = start_query(query, model, model.batch_sizes, **options)
    assert lane.size == model.batch_sizes[lane.kind]
    assert lane.layers == (("r3",) if lane.passes == "gradient" else ())
    return lane.kind


def test_number_of_rows_selects_the_lane() -> None:
    model = as_model(nets.tiny_cnn())
    model.batch_sizes |= SIZES
    kinds = [tuple(kind_of(query, model) for query in rows_of(model, rows)) for rows in (1, 2, 3, 4, 40)]
    small, large = ("forward-small", "gradient-small"), ("forward", "gradient")
    assert kinds == [small, small, ("forward", "gradient-small"), large, large]
    assert kind_of(Predict(model.image(X)), model) == "forward-small"
    sums = [Sum(query, lambda i, answer: torch.zeros(1), 1) for query in rows_of(model, 1)]
    assert tuple(kind_of(query, model) for query in sums) == small
    ascend = Ascend(torch.ones(1, 1), warmup.ScaledImages(), (X[None],), 5, 1.0)
    assert kind_of(ascend, model) == "ascend"


def test_batches_without_padding_rows_need_no_small_lanes() -> None:
    model = as_model(nets.tiny_cnn())
    model.batch_sizes |= SIZES
    assert [kind_of(query, model, small_lanes=False) for query in rows_of(model, 1)] == ["forward", "gradient"]
    with running(batch_invariant=False) as engine:
        job = submit(engine, model, X, call(model, "grad-cam"))
        job.future.result(TIMEOUT_S)
    assert lanes_of(job) == [("forward", 1), ("gradient", 1)]


def test_queries_with_few_rows_do_not_use_the_fast_forward_pass() -> None:
    """A GPU has a fast forward pass for batches of one size only."""
    model = as_model(nets.tiny_cnn())
    model.batch_sizes |= SIZES
    model.fast_forward, model.fast_forward_size = model.module, 4
    lanes = [start_query(rows_of(model, rows)[0], model, model.batch_sizes)[0] for rows in (2, 4)]
    assert [(lane.kind, lane.fast_forward) for lane in lanes] == [("forward-small", False), ("forward", True)]


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ({}, SIZES),
        ({"ascend": 1}, {**SIZES, "ascend": 1}),
        ({"forward": 9}, {"forward": 9, "gradient": 4, "ascend": 4, "gradient-small": 3}),
        ({"forward": 9, "forward-small": 5}, {**SIZES, "forward": 9, "forward-small": 5}),
        ({"gradient-small": 1}, {**SIZES, "gradient-small": 1}),
        (WITHOUT, WITHOUT),
    ],
    ids=str,
)
def test_request_without_the_size_of_a_small_lane_has_none(
    requested: dict[LaneKind, int], expected: dict[LaneKind, int]
) -> None:
    assert merged_sizes(SIZES, requested) == expected


# ---- requests --------------------------------------------------------------------------------------------------------


def lanes_of(job: Job[RequestResult]) -> list[tuple[LaneKind, int]]:
    """Return the kind of lane of each batch of the job, and the number of its rows with those of padding."""
    return [(record.kind, record.rows + record.padding) for record, _ in job.batch_records]


def test_single_grad_cam_runs_in_small_batches(timed: list[int]) -> None:
    model = as_model(BySize())
    warm_up(model)
    with running() as engine:
        job = submit(engine, model, X, call(model, "grad-cam"))
        job.future.result(TIMEOUT_S)
        assert {key: (lane.rows, lane.padding) for key, lane in engine.counters.lanes.items()} == {
            ("model", "fp32", "forward-small"): (1, 1),
            ("model", "fp32", "gradient-small"): (1, 1),
        }
    assert lanes_of(job) == [("forward-small", 2), ("gradient-small", 2)]
    assert job.batch_sizes == MEASURED


CASES: list[tuple[str, dict[str, Any]]] = [
    ("grad-cam", {}),
    ("score-cam", {}),
    ("rise", {"masks": 9}),
    ("smooth-grad", {"samples": 2}),
    ("integrated-gradients", {"steps": 7}),
    ("ablation-cam", {}),
    ("opti-cam", {"steps": 3}),
]


def calls(model: Model) -> list[MethodCall]:
    return [call(model, name, **parameters) for name, parameters in CASES]


def test_bits_are_the_same_alone_and_under_load_and_with_the_sizes_of_a_receipt() -> None:
    """In the network, the bits of a row depend on the size of its batch."""
    model, plain = as_model(BySize(100)), as_model(BySize(100))
    model.batch_sizes |= SIZES
    with running() as engine:
        with stopped(engine):  # so that no request ends before the last one arrives
            jobs = [submit(engine, model, X, each, [i % 5]) for each in calls(model) for i in range(4)]
        together = [job.future.result(TIMEOUT_S).maps for job in jobs]
        assert {kind for _, _, kind in engine.counters.lanes} == {*SIZES}, "all kinds of lane are used"
        batches = engine.counters.batches
        alone = [
            submit(engine, model, X, each, [i % 5]).future.result(TIMEOUT_S).maps
            for each in calls(model)
            for i in range(4)
        ]
        assert engine.counters.batches - batches > 1.5 * batches, "the requests have shared batches"
    assert all(map(torch.equal, together, alone))
    for i, each in enumerate(calls(plain)):  # a server without small lanes replays the receipt
        assert torch.equal(explained(plain, X, each, [0], batch_sizes=jobs[4 * i].batch_sizes).maps, alone[4 * i])


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_receipt_of_a_server_without_small_lanes_gives_its_bits(name: str, parameters: dict[str, Any]) -> None:
    model, plain = as_model(BySize(100)), as_model(BySize(100))
    model.batch_sizes |= SIZES
    theirs = explained(plain, X, call(plain, name, **parameters), [1])
    with running() as engine:
        job = submit(engine, model, X, call(model, name, **parameters), [1], batch_sizes=plain.batch_sizes)
        assert torch.equal(job.future.result(TIMEOUT_S).maps, theirs.maps)
    assert job.batch_sizes == plain.batch_sizes
    assert all(size == 4 for _, size in lanes_of(job))


@pytest.mark.parametrize("requested", [None, SIZES], ids=["sizes of the model", "sizes of the request"])
def test_out_of_memory_halves_the_lane_in_which_it_occurs(
    monkeypatch: pytest.MonkeyPatch, requested: dict[LaneKind, int] | None
) -> None:
    def limited(model: Model, lane: Lane, slices: Sequence[BatchSlice], size: int) -> None:
        if lane.kind == "forward-small" and size > 1:
            raise torch.OutOfMemoryError("no memory")
        run_batch(model, lane, slices, size)

    monkeypatch.setattr(batch_runner, "run_batch", limited)
    model = as_model(nets.tiny_cnn())
    if requested is None:
        model.batch_sizes |= SIZES
    before = {**model.batch_sizes}
    with running() as engine:
        jobs = [submit(engine, model, X, call(model, "grad-cam"), batch_sizes=requested) for _ in range(2)]
        for job in jobs:
            job.future.result(TIMEOUT_S)
            assert job.batch_sizes == {**SIZES, "forward-small": 1}
            assert lanes_of(job) == [("forward-small", 1), ("gradient-small", 3)]
    if requested is None:
        before["forward-small"] = 1
    assert model.batch_sizes == before


def test_rate_of_small_lanes_limits_requests_that_only_use_them() -> None:
    """A server that has run no large batch for two minutes knows only the rate of small ones."""
    model = as_model(nets.tiny_cnn())
    model.batch_sizes |= SIZES

    def rate(name: str) -> float:
        subject = call(model, name)
        return limits(model, subject, rows_needed(model, subject, (), 1)).rows_per_s

    assert [rate("grad-cam"), rate("score-cam")] == [0, 0]
    model.throughput["forward-small"].observe(2, 0.1)
    assert [rate("grad-cam"), rate("score-cam")] == [20, 0]
    model.throughput["forward"].observe(4, 0.1)
    assert [rate("grad-cam"), rate("score-cam")] == [40, 40]


@pytest.mark.gpu
def test_single_grad_cam_on_a_gpu_runs_in_small_batches() -> None:
    config = ModelConfig(
        name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), precision=("fp32",), compile=False
    )
    model = load(config, torch.device("cuda"))
    sizes: dict[LaneKind, int] = {**dict.fromkeys(WITHOUT, 64), "forward-small": 8, "gradient-small": 16}
    for _ in warm_up_steps(model, sizes):
        pass
    assert model.batch_sizes == sizes, "sizes that give the same bits are not searched for on GPUs"
    with running() as engine:
        job = submit(engine, model, X, call(model, "grad-cam"))
        maps = job.future.result(TIMEOUT_S).maps
    assert lanes_of(job) == [("forward-small", 8), ("gradient-small", 16)]
    assert torch.equal(explained(model, X, call(model, "grad-cam"), batch_sizes=job.batch_sizes).maps, maps)
