"""Forward passes in which nobody looks at a layer: compiled on request, CUDA graphs on a GPU."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.engine.lanes import fast_forward
from camserve_server.engine.warmup import warm_up
from camserve_server.models.load import load
from camserve_server.models.model import LaneKind, Model
from tests import nets
from tests.support import call, explained, metric, noise, running, submit

CPU = torch.device("cpu")
SMALL = {"name": "small", "source": "python:tests.nets:tiny_cnn", "input_size": (32, 32), "batch_size": 4}
METHODS = ("poly-cam", "score-cam", "rise", "ablation-cam")
# What torch says of its own imports, and of precisions that are chosen.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}:torch") for kind in ("DeprecationWarning", "UserWarning")]
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def small(device: torch.device = CPU, **config: object) -> Model:
    model = load(ModelConfig.model_validate({**SMALL, **config}), device)
    for each in model.precisions.values():
        warm_up(each, 4)
    return model


def maps(model: Model, method: str) -> Tensor:
    parameters = {"masks": 20} if method == "rise" else {}
    return explained(model, noise(3, 32, 32), call(model, method, None, **parameters), [1, 2]).maps


def weights_of(module: object) -> list[Tensor]:
    assert isinstance(module, nn.Module)
    return [*module.parameters(), *module.buffers()]


@pytest.fixture(scope="module")
def compiled() -> Model:
    return small(compile=True)


@compiler
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_network_gives_the_same_maps(compiled: Model, method: str) -> None:
    assert compiled.fast_forward is not None
    assert {id(weight) for weight in weights_of(compiled.fast_forward)} == {
        id(weight) for weight in weights_of(compiled.module)
    }
    torch.testing.assert_close(maps(compiled, method), maps(small(), method), rtol=0, atol=1e-5)


@compiler
def test_its_bits_do_not_depend_on_who_looks_at_a_layer_meanwhile(compiled: Model) -> None:
    """Batches in which somebody does so take another way than those in which nobody does."""
    x, asked = noise(3, 32, 32), call(compiled, "poly-cam")
    alone = explained(compiled, x, asked, [1], [metric("insertion")])
    with running() as engine:
        others = [
            submit(engine, compiled, noise(3, 32, 32, seed=i), call(compiled, name), [i % 5])
            for i in range(3)
            for name in METHODS
        ]
        among = submit(engine, compiled, x, asked, [1], [metric("insertion")]).future.result(60)
        for other in others:
            other.future.result(60)
    assert torch.equal(among.maps, alone.maps)
    assert among.scores == alone.scores


@compiler
def test_a_random_copy_runs_its_own_weights(compiled: Model) -> None:
    """Not those that were compiled."""
    check = metric("randomisation-spearman", steps=3)
    scores = [
        explained(model, noise(3, 32, 32), call(model, "score-cam"), [1], [check]).scores[0][0].value
        for model in (compiled, small())
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert scores[0] < 0.99


def test_nothing_is_compiled_unless_asked_for() -> None:
    assert small().fast_forward is None


@pytest.mark.parametrize("breaks", [True, False], ids=["it fails", "it has other logits"])
def test_a_way_that_does_not_work_is_not_taken(monkeypatch: pytest.MonkeyPatch, breaks: bool) -> None:
    def way(forward: fast_forward.ForwardPass) -> fast_forward.ForwardPass:
        if breaks:
            raise RuntimeError("a network that cannot be followed\nand why")
        return lambda X: forward(X) + 0.1

    monkeypatch.setattr(fast_forward, "_techniques", lambda model: [("torch.compile", way)])
    with capture_logs() as logs:
        model = small(compile=True)
    assert model.fast_forward is None
    why = "RuntimeError: a network that cannot be followed" if breaks else "other logits than the network's own"
    assert [(log["event"], log["way"], log["reason"]) for log in logs] == [
        ("the network runs without", "torch.compile", why)
    ]
    assert torch.isfinite(maps(model, "score-cam")).all()


@compiler
def test_only_batches_of_its_size_take_it(compiled: Model) -> None:
    """Callers may ask for others, and each would be compiled or recorded anew."""
    seen: list[int] = []
    forward = compiled.fast_forward
    assert forward is not None

    def watched(X: Tensor) -> Tensor:
        seen.append(len(X))
        return forward(X)

    model = replace(compiled, fast_forward=watched)
    for size in (4, 3):
        sizes: dict[LaneKind, int] = {"forward": size, "gradient": size, "ascend": size}
        explained(model, noise(3, 32, 32), call(model, "score-cam"), [1], batch_sizes=sizes)
    assert set(seen) == {4}


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, {"compile": True}], ids=["plain", "compiled"])
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_the_same_maps(config: dict[str, bool], method: str) -> None:
    with capture_logs() as logs:
        model = small(torch.device("cuda"), **config)
    assert (model.fast_forward is not None, logs) == (True, [])
    torch.testing.assert_close(maps(model, method).cpu(), maps(small(), method), rtol=0, atol=1e-4)
    assert torch.equal(maps(model, method), maps(model, method))


@pytest.mark.gpu
def test_a_graph_keeps_what_it_gave() -> None:
    device = torch.device("cuda")
    model = small(device)
    forward = fast_forward.GraphedForward(model.module)
    with torch.no_grad():
        first, second = (noise(4, 3, 32, 32, seed=seed).to(device) for seed in (1, 2))
        found = forward(first)
        forward(second)
        torch.testing.assert_close(found, model.module(first))


class Asks(nn.Module):
    """A network that looks at its own activations, which cannot be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y if float(y.sum()) < 1e9 else -y


@pytest.mark.gpu
def test_a_network_that_cannot_be_recorded_is_served_as_it_is() -> None:
    with capture_logs() as logs:
        model = small(torch.device("cuda"), source="python:tests.server.engine.test_fast_forward:Asks")
    assert model.fast_forward is None
    assert [log["way"] for log in logs] == ["CUDA graphs"]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.testing.assert_close(maps(model, "poly-cam").cpu(), maps(small(), "poly-cam"), rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_a_gpu_is_not_given_more_than_a_few_batches_ahead() -> None:
    """So that a cancel is quick: what is called done is done but for as many."""
    model = small(torch.device("cuda"), source="torchvision:resnet50", input_size=(224, 224), allow_random_weights=True)
    with running() as engine:
        job = submit(engine, model, noise(3, 224, 224), call(model, "score-cam"), [1])
        _until(lambda: job.rows > 400)
        engine.cancel(job)
        assert job.future.exception(5) is not None
        start = time.perf_counter()
        torch.cuda.synchronize()
        assert time.perf_counter() - start < 0.5


def _until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)
