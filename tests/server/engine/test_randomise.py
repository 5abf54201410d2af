"""Random copies of networks: their weights, their number, and their release."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.engine import batch_runner, random_copies
from camserve_server.engine.job import Event, Limits
from camserve_server.engine.lanes.dispatch import run_batch
from camserve_server.errors import Cancelled, Expired, InternalError, OutOfMemory
from camserve_server.models.load import state_digest
from camserve_server.models.model import Model
from camserve_server.models.randomise import RandomCopy, weighted_layers
from camserve_server.plan import Plan, Predict, Randomise, Randomised
from camserve_server.rows import normal
from tests import nets
from tests.support import TIMEOUT_S, Clock, as_model, call, explained, metric, noise, running, stopped, submit

SIZE = (37, 29)
X = noise(3, *SIZE)
NAMES = ("randomisation-spearman", "randomisation-ssim", "randomisation-hog")
ALL = [metric(name, seed=3) for name in NAMES]


@pytest.fixture
def model() -> Model:
    return as_model(nets.tiny_cnn(), SIZE)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Return a list to which each new copy of a network is appended, as a weak reference."""
    made: list[weakref.ref[Any]] = []

    class Watched(RandomCopy):
        def __init__(self, served: Model) -> None:
            super().__init__(served)
            made.append(weakref.ref(self.model.module))

    monkeypatch.setattr(random_copies, "RandomCopy", Watched)
    return made


def wait_until_released(copies: list[weakref.ref[Any]]) -> None:
    """Wait until no copy is alive. The engine's thread can refer to the last one shortly after the end of a request."""
    until = time.monotonic() + TIMEOUT_S
    while any(copy() is not None for copy in copies):
        assert time.monotonic() < until
        time.sleep(0.01)
        gc.collect()


def randomised(model: Model, method: str = "layer-cam", **parameters: Any) -> list[Randomised]:
    events: list[Event] = []
    metrics = [metric("randomisation-ssim", seed=3, **parameters)]
    with running() as engine:
        submit(engine, model, X, call(model, method), [1], metrics, events).future.result(TIMEOUT_S)
    return [event for event in events if isinstance(event, Randomised)]


# ---- random weights --------------------------------------------------------------------------------------------------


def test_weighted_layers_are_in_the_order_of_the_forward_pass() -> None:
    class Backwards(nn.Module):
        """Network whose layers are defined in the reverse order of the forward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 5)
            self.scale = nn.Parameter(torch.ones(1))
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.body(x * self.scale).mean(dim=(2, 3)))
            return y

    assert weighted_layers(as_model(Backwards())) == ("scale", "body.0", "body.2", "head")
    vit = weighted_layers(as_model(nets.tiny_vit()))
    assert vit[:4] == ("cls_token", "pos_embed", "patch_embed.proj", "blocks.0.norm1")
    assert vit[-2:] == ("norm", "head")


def test_random_layer_keeps_the_mean_and_deviation_of_the_served_layer(model: Model) -> None:
    copy = RandomCopy(model)
    copy.randomise(["c2", "fc"], 7)
    for i, (name, served) in enumerate(model.module.named_parameters()):
        drawn = copy.model.module.get_parameter(name)
        if name.startswith(("c2.", "fc.")):
            expected = served.mean() + served.std(correction=0) * normal(served.shape, 7, i)
            assert torch.allclose(drawn, expected, atol=1e-6)
            assert name == "fc.bias" or not torch.allclose(drawn, served)
        else:
            assert torch.equal(drawn, served)
    weights = copy.model.module.get_parameter("c2.weight").clone()
    copy.randomise(["c2", "c1"], 7)
    assert torch.equal(copy.model.module.get_parameter("c2.weight"), weights), (
        "the weights do not depend on the other random layers"
    )
    assert torch.equal(copy.model.module.get_parameter("fc.weight"), model.module.get_parameter("fc.weight"))
    copy.randomise((), 7)
    assert state_digest(copy.model.module) == state_digest(model.module)


@pytest.mark.parametrize("order", ["cascading", "independent"])
def test_each_step_uses_the_layers_that_it_reports(model: Model, order: str) -> None:
    steps = randomised(model, order=order)
    assert [step.layers for step in steps] == [("fc",), ("c3",), ("c2",), ("c1",)]
    assert [(step.order, step.index, step.count, step.target) for step in steps] == [(order, i, 4, 1) for i in range(4)]
    copy, random = RandomCopy(model), list[str]()
    for step in steps:
        random = [*random, *step.layers] if order == "cascading" else [*step.layers]
        copy.randomise(random, 3)
        assert torch.equal(explained(copy.model, X, call(copy.model, "layer-cam"), [1]).maps[0], step.saliency)


def test_last_step_of_a_cascade_randomises_the_whole_network(model: Model) -> None:
    net = nets.tiny_cnn()
    for i, weight in enumerate(net.parameters()):
        std, mean = torch.std_mean(weight, correction=0)
        weight.data = normal(weight.shape, 3, i) * std + mean
    expected = explained(as_model(net, SIZE), X, call(model, "layer-cam"), [1]).maps[0]
    assert torch.allclose(randomised(model)[-1].saliency, expected, atol=1e-5)


def test_layers_are_distributed_evenly_over_the_steps(model: Model) -> None:
    assert [step.layers for step in randomised(model, steps=3)] == [("fc",), ("c3",), ("c2", "c1")]
    assert [step.layers for step in randomised(model, steps=1)] == [("fc", "c3", "c2", "c1")]


def test_class_weights_of_cam_are_random_too(model: Model) -> None:
    first, *_ = randomised(model, "cam")
    assert first.layers == ("fc",)
    assert first.similarity.spearman < 0.9


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["cascading", "independent"])
@pytest.mark.parametrize("method", ["fake-cam", "center-gaussian", "random"])
def test_methods_that_do_not_use_the_network_score_1(model: Model, method: str, order: str) -> None:
    scored = [metric(name, order=order) for name in NAMES]
    for score in explained(model, X, call(model, method), [1], scored).scores[0]:
        assert score.value == pytest.approx(1)
        assert score.curve == pytest.approx([1] * 4)


def test_three_metrics_share_rows_and_events(model: Model) -> None:
    events: list[Event] = []
    with running() as engine:
        job = submit(engine, model, X, call(model, "grad-cam"), [1], ALL, events)
        scores = job.future.result(TIMEOUT_S).scores[0]
    assert job.rows == 2 + 4 * 2
    assert job.rows_owed == 0
    steps = [event for event in events if isinstance(event, Randomised)]
    assert len(steps) == 4
    for score, name in zip(scores, ("spearman", "ssim", "hog"), strict=True):
        assert score.curve == tuple(getattr(step.similarity, name) for step in steps)
        assert score.value == pytest.approx(sum(score.curve) / 4)


# ---- the served network and other requests ---------------------------------------------------------------------------


@pytest.mark.slow
def test_copies_change_neither_the_served_network_nor_other_requests(
    model: Model, copies: list[weakref.ref[Any]]
) -> None:
    before, plain = state_digest(model.module), call(model, "poly-cam")
    with running(max_copies=2) as engine:
        expected = submit(engine, model, X, plain).future.result(TIMEOUT_S)
        alone = submit(engine, model, X, plain, [1], ALL).future.result(TIMEOUT_S)
        jobs = [submit(engine, model, X, plain, [1], ALL if i % 2 else ()) for i in range(8)]
        for i, job in enumerate(jobs):
            result = job.future.result(TIMEOUT_S)
            assert torch.equal(result.maps, alone.maps)
            assert result.scores == (alone.scores if i % 2 else ((),))
        assert torch.equal(submit(engine, model, X, plain).future.result(TIMEOUT_S).maps, expected.maps)
        assert len(copies) == 5
        wait_until_released(copies)
    assert state_digest(model.module) == before
    other = explained(model, X, plain, [1], [metric("randomisation-ssim", seed=4)]).scores[0][0]
    assert other.curve != alone.scores[0][1].curve


@pytest.fixture
def copy_counts(monkeypatch: pytest.MonkeyPatch, copies: list[weakref.ref[Any]]) -> list[int]:
    """Return a list to which the number of copies is appended after each batch."""
    counts = list[int]()

    def counted(*args: Any) -> None:
        run_batch(*args)
        counts.append(sum(copy() is not None for copy in copies))

    monkeypatch.setattr(batch_runner, "run_batch", counted)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 3])
def test_number_of_copies_never_exceeds_the_limit(model: Model, copy_counts: list[int], limit: int) -> None:
    with running(max_copies=limit) as engine:
        with stopped(engine):  # so that no request ends before the last one arrives
            jobs = [submit(engine, model, X, call(model, "grad-cam"), [1, 2], ALL) for _ in range(6)]
        assert len({job.future.result(TIMEOUT_S).scores for job in jobs}) == 1
    assert max(copy_counts) == limit


def plan_that_holds_a_copy(model: Model, broken: threading.Event) -> Plan[None]:
    """Hold a copy until the request is ended from outside or `broken` is set."""
    yield from Randomise(("fc",))
    while not broken.is_set():
        yield from Predict(model.image(X))
    raise ValueError("a bug in a metric")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["cancelled", "late", "broken"])
def test_request_that_ends_early_releases_its_copy(
    monkeypatch: pytest.MonkeyPatch, model: Model, copies: list[weakref.ref[Any]], end: str
) -> None:
    clock = Clock().install(monkeypatch)
    method, broken = call(model, "grad-cam"), threading.Event()
    with running(max_copies=1) as engine:
        limits = Limits(deadline=time.monotonic() + 1) if end == "late" else Limits()
        holds = engine.submit(plan_that_holds_a_copy(model, broken), model, rows=10**5, limits=limits)
        while not copies:
            time.sleep(0.01)
        gives_up, waits = (submit(engine, model, X, method, [1], ALL) for _ in range(2))
        submit(engine, model, X, method).future.result(TIMEOUT_S)  # a request without a copy does not wait
        engine.cancel(gives_up)
        with pytest.raises(Cancelled):
            gives_up.future.result(TIMEOUT_S)
        assert not waits.future.done()
        assert len(copies) == 1
        if end == "cancelled":
            engine.cancel(holds)
        if end == "late":
            clock.advance(2)
        if end == "broken":
            broken.set()
        with pytest.raises({"cancelled": Cancelled, "late": Expired, "broken": InternalError}[end]):
            holds.future.result(TIMEOUT_S)
        assert len(waits.future.result(TIMEOUT_S).scores[0]) == 3
        assert len(copies) == 2
        wait_until_released(copies)


def test_copy_that_does_not_fit_fails_its_request_only(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    def no_memory(served: Model) -> RandomCopy:
        raise torch.OutOfMemoryError("no memory")

    with running() as engine:
        monkeypatch.setattr(random_copies, "RandomCopy", no_memory)
        with pytest.raises(OutOfMemory, match="a copy of model"):
            submit(engine, model, X, call(model, "grad-cam"), [1], ALL).future.result(TIMEOUT_S)
        monkeypatch.undo()
        submit(engine, model, X, call(model, "grad-cam"), [1], ALL).future.result(TIMEOUT_S)
