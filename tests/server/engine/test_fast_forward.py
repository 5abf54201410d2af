"""Fast forward passes of batches without hooks: torch.compile on request, CUDA graphs on a GPU."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.engine import batch_runner
from camserve_server.engine.lanes import fast_forward
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane, run_batch, start_query
from camserve_server.engine.warmup import warm_up
from camserve_server.models.load import load
from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import Capture, Predict, Query
from camserve_server.service import responses
from tests import nets
from tests.support import TIMEOUT_S, call, explained, metric, noise, running, stopped, submit

CPU = torch.device("cpu")
SMALL = {"name": "small", "source": "python:tests.nets:tiny_cnn", "input_size": (32, 32), "batch_size": 4}
METHODS = ("poly-cam", "score-cam", "rise", "ablation-cam")
# torch warns about its own imports and about the choice of precisions.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}:torch") for kind in ("DeprecationWarning", "UserWarning")]
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def load_small(device: torch.device = CPU, **config: object) -> Model:
    # Not "auto", with which the tests on a GPU would compile all of their networks.
    model = load(ModelConfig.model_validate({"precision": "fp32", "compile": False, **SMALL, **config}), device)
    for each in model.precisions.values():
        warm_up(each, 4)
    return model


def maps(model: Model, method: str) -> Tensor:
    parameters = {"masks": 20} if method == "rise" else {}
    return explained(model, noise(3, 32, 32), call(model, method, None, **parameters), [1, 2]).maps


def receipt_versions(model: Model) -> Mapping[str, str]:
    return responses._constant_receipt(model).versions


def weights_of(module: object) -> list[Tensor]:
    assert isinstance(module, nn.Module)
    return [*module.parameters(), *module.buffers()]


@pytest.fixture(scope="module")
def compiled() -> Model:
    return load_small(compile=True)


@pytest.mark.slow
@compiler
@pytest.mark.parametrize("method", METHODS)
def test_compiled_network_gives_the_same_maps(compiled: Model, method: str) -> None:
    assert compiled.fast_forward is not None
    assert compiled.compiled
    assert {id(weight) for weight in weights_of(compiled.fast_forward)} == {
        id(weight) for weight in weights_of(compiled.module)
    }
    torch.testing.assert_close(maps(compiled, method), maps(load_small(), method), rtol=0, atol=1e-5)


@pytest.mark.slow
@compiler
def test_bits_do_not_depend_on_requests_with_hooks_in_other_batches(compiled: Model) -> None:
    """Queries with hooks run on the module itself, queries without hooks on the compiled network."""
    x, request = noise(3, 32, 32), call(compiled, "poly-cam")
    alone = explained(compiled, x, request, [1], [metric("insertion")])
    with running() as engine:
        others = [
            submit(engine, compiled, noise(3, 32, 32, seed=i), call(compiled, name), [i % 5])
            for i in range(3)
            for name in METHODS
        ]
        among = submit(engine, compiled, x, request, [1], [metric("insertion")]).future.result(TIMEOUT_S)
        for other in others:
            other.future.result(TIMEOUT_S)
    assert torch.equal(among.maps, alone.maps)
    assert among.scores == alone.scores


@pytest.mark.slow
@compiler
def test_random_copy_does_not_use_the_compiled_weights(compiled: Model) -> None:
    check = metric("randomisation-spearman", steps=3)
    scores = [
        explained(model, noise(3, 32, 32), call(model, "score-cam"), [1], [check]).scores[0][0].value
        for model in (compiled, load_small())
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert scores[0] < 0.99


def test_networks_on_cpus_are_not_compiled_by_default() -> None:
    assert ModelConfig.model_validate(SMALL).compile == "auto"
    model = load_small(compile="auto")
    assert (model.fast_forward, model.compile, model.compiled) == (None, False, False)


@pytest.mark.slow
@compiler
def test_receipts_name_the_compiler_only_if_it_is_used(compiled: Model) -> None:
    assert receipt_versions(compiled)["torch.compile"] == torch.__version__
    for other in (load_small(), compiled.with_module(compiled.module)):
        assert "torch.compile" not in receipt_versions(other)


def test_all_variants_of_a_network_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile silently stops after some variants. Then other devices or models would not be compiled."""
    compiled_sizes = list[int]()
    torch_compile: Any = torch.compile

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        compiled_sizes.append(max(len(each) for each in inputs if each.shape[1:] == (3, 32, 32)))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda net, **_: torch_compile(net, dynamic=False, backend=backend))
    models = list[Model]()
    sizes = (21, 22, 23, 24, 25, 26, 27, 28, 29, 30)  # no other test compiles the network for them
    for size in sizes:
        config = ModelConfig.model_validate({"precision": "fp32", **SMALL, "compile": True, "batch_size": size})
        models.append(load(config, CPU))
        model = models[-1]
        model.fast_forward = fast_forward.build_fast_forward(model, size)
        assert model.compiled
    assert compiled_sizes == [*sizes]
    for model, size in zip(models, sizes, strict=True):  # they are not compiled again later
        assert model.fast_forward is not None
        with torch.no_grad():
            model.fast_forward(noise(size, 3, 32, 32).contiguous(memory_format=model.memory_format))
    assert compiled_sizes == [*sizes]


@pytest.mark.parametrize("breaks", [True, False], ids=["exception", "wrong logits"])
def test_technique_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch, breaks: bool) -> None:
    def technique(forward: fast_forward.ForwardPass) -> fast_forward.ForwardPass:
        if breaks:
            raise RuntimeError("this network cannot be compiled\nsecond line")
        return lambda X: forward(X) + 0.1

    monkeypatch.setattr(fast_forward, "_techniques", lambda model, X: [("torch.compile", technique)])
    with capture_logs() as logs:
        model = load_small(compile=True)
    assert (model.fast_forward, model.compiled) == (None, False)
    reason = (
        "RuntimeError: this network cannot be compiled" if breaks else "its logits differ from those of the network"
    )
    assert [(log["event"], log["way"], log["reason"]) for log in logs] == [
        ("a faster forward pass is not used", "torch.compile", reason)
    ]
    assert torch.isfinite(maps(model, "score-cam")).all()


@pytest.mark.parametrize("kind", ["gradient", "forward"])
def test_lack_of_memory_in_other_batches_does_not_change_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch, kind: LaneKind
) -> None:
    """Of other passes, or of a size that a caller has named. Other bits would depend on requests of others."""
    recordings = list[int]()

    class Graph:
        def __init__(self, function: Any) -> None:
            self.function, self.y = function, function()

        def replay(self) -> None:
            self.y.copy_(self.function())

    def record(function: Any, device: torch.device) -> tuple[Graph, Tensor]:
        graph = Graph(function)
        recordings.append(len(graph.y))
        return graph, graph.y

    def limited(model: Model, lane: Lane, slices: Any, size: int) -> None:
        if lane.kind == kind and size > 4:
            raise torch.OutOfMemoryError("no memory")
        run_batch(model, lane, slices, size)

    model = load_small()
    monkeypatch.setattr(fast_forward, "record", record)
    monkeypatch.setattr(batch_runner, "run_batch", limited)
    model.fast_forward, model.fast_forward_size = fast_forward.GraphedForward(lambda X: 2 * model.module(X)), 4
    x, score_cam = noise(3, 32, 32), call(model, "score-cam")
    with running() as engine:
        before = submit(engine, model, x, score_cam, [1]).future.result(TIMEOUT_S).maps
        assert recordings == [4]
        integrated = call(model, "integrated-gradients", None)
        sizes: dict[LaneKind, int] = {"forward": 8, "gradient": 8, "ascend": 4}
        for method in (integrated, score_cam):
            submit(engine, model, x, method, [1], batch_sizes=sizes).future.result(TIMEOUT_S)
        after = submit(engine, model, x, score_cam, [1]).future.result(TIMEOUT_S).maps
    assert recordings == [4, 4], "the memory of the recording was freed"
    assert torch.equal(before, after)


@pytest.mark.slow
@compiler
def test_only_batches_of_the_configured_size_use_fast_forward(compiled: Model) -> None:
    """Another batch size of a caller would need a compilation or a recording of its own."""
    sizes_seen: list[int] = []
    forward = compiled.fast_forward
    assert forward is not None

    def watched(X: Tensor) -> Tensor:
        sizes_seen.append(len(X))
        return forward(X)

    model = replace(compiled, fast_forward=watched)
    for size in (4, 3):
        sizes: dict[LaneKind, int] = {"forward": size, "gradient": size, "ascend": size}
        explained(model, noise(3, 32, 32), call(model, "score-cam"), [1], batch_sizes=sizes)
    assert set(sizes_seen) == {4}


@pytest.mark.parametrize("sizes", [(), (1, 2, 4)], ids=["padded", "small batches"])
def test_bits_of_short_queries_do_not_depend_on_other_requests(sizes: tuple[int, ...]) -> None:
    """On a CPU, they run on the network, whether the batch is full or contains queries with hooks."""
    model = load_small()

    def other_bits(X: Tensor) -> Tensor:
        return model.module(X) + 1e-3  # type: ignore[no-any-return]

    model.fast_forward, model.fast_forward_size, model.equal_sizes = other_bits, 4, {"forward": sizes} if sizes else {}
    x = model.image(noise(3, 32, 32))
    capture = Capture(x, (model.layers[0].name,))
    cases: list[tuple[int, list[Query[Any]]]] = [(2, [Predict(x)] * 3), (3, [capture])]
    with running() as engine:
        alone = engine.submit(iter(Predict(x)), model, rows=1).future.result(TIMEOUT_S)
        for batches, others in cases:
            with stopped(engine):
                among = engine.submit(iter(Predict(x)), model, rows=1)
                for query in others:
                    engine.submit(iter(query), model, rows=1)
            assert torch.equal(among.future.result(TIMEOUT_S), alone)
            assert engine.counters.batches == batches, "the queries share one batch"


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, {"compile": True}], ids=["plain", "compiled"])
@pytest.mark.parametrize("method", METHODS)
def test_gpu_gives_the_same_maps(config: dict[str, bool], method: str) -> None:
    with capture_logs() as logs:
        model = load_small(torch.device("cuda"), **config)
    assert (model.fast_forward is not None, logs) == (True, [])
    torch.testing.assert_close(maps(model, method).cpu(), maps(load_small(), method), rtol=0, atol=1e-4)
    assert torch.equal(maps(model, method), maps(model, method))


@pytest.mark.gpu
def test_replay_of_a_graph_does_not_change_earlier_results() -> None:
    device = torch.device("cuda")
    model = load_small(device)
    forward = fast_forward.GraphedForward(model.module)
    with torch.no_grad():
        first, second = (noise(4, 3, 32, 32, seed=seed).to(device) for seed in (1, 2))
        logits = forward(first)
        forward(second)
        torch.testing.assert_close(logits, model.module(first))


class ReadsActivations(nn.Module):
    """Network whose control flow depends on its activations, which cannot be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y if float(y.detach().sum()) < 1e9 else -y


@pytest.mark.gpu
def test_network_that_cannot_be_recorded_is_served_without_graphs() -> None:
    with capture_logs() as logs:
        model = load_small(torch.device("cuda"), source="python:tests.server.engine.test_fast_forward:ReadsActivations")
    assert model.fast_forward is None
    assert sorted(log["event"] for log in logs) == [
        "a faster forward pass is not used",
        "the steps of an ascent are not recorded as a CUDA graph",
    ]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.testing.assert_close(maps(model, "poly-cam").cpu(), maps(load_small(), "poly-cam"), rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_gpu_has_at_most_two_unfinished_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancellation then waits for at most two batches."""
    device = torch.device("cuda")
    a = torch.ones(4096, 4096, device=device)
    launched: list[torch.cuda.Event] = []
    unfinished: list[int] = []

    def slow_batch(*args: object) -> None:
        unfinished.append(sum(not event.query() for event in launched))  # type: ignore[no-untyped-call]
        for _ in range(50):
            torch.mm(a, a)
        launched.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
        launched[-1].record()

    monkeypatch.setattr(batch_runner, "run_batch", slow_batch)
    model = load_small(device)
    runner = batch_runner.BatchRunner(padded=True, on_halved=lambda model, kind, size: None)
    lane, query = start_query(Predict(model.image(noise(3, 32, 32))), model, model.batch_sizes)
    for _ in range(10):
        assert runner.run(model, lane, [BatchSlice(query, 0, 1)]) == {}
    assert max(unfinished) <= batch_runner.IN_FLIGHT
    torch.cuda.synchronize()
