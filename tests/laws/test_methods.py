"""What every registered method must keep to, whatever it computes. A new method is tested the day it is added."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from camserve_server import registry
from camserve_server.engine import Engine, Job
from camserve_server.explain import Explained, MethodCall
from camserve_server.models.model import Model
from tests import nets
from tests.support import as_model, call, explained, metric, noise, running, submit

METHODS = sorted(registry.METHODS)
SIZE = (37, 29)
QUICK = {"opti-cam": {"steps": 12}}


@pytest.fixture(scope="module")
def model() -> Model:
    return as_model(nets.tiny_cnn(), SIZE)


def quick(model: Model, method: str) -> MethodCall:
    return call(model, method, **QUICK.get(method, {}))


def check(result: Explained, size: tuple[int, int] = SIZE) -> None:
    """Shape, range, finite."""
    assert result.maps.shape == (len(result.targets), *size)
    assert result.maps.dtype == torch.float32
    assert result.maps.isfinite().all()
    assert 0 <= float(result.maps.min()) <= float(result.maps.max()) <= 1


@pytest.mark.parametrize("method", METHODS)
def test_shape_range_and_targets(model: Model, method: str) -> None:
    x = noise(3, *SIZE)
    likeliest = model.module(x[None])[0].argsort(descending=True).tolist()[:2]
    result = explained(model, x, quick(model, method), likeliest)
    check(result)
    assert result.targets.index == tuple(likeliest)
    assert float(result.maps[0].max()) > 0
    assert not torch.equal(result.maps[0], result.maps[1]), "a map is a map of its class"
    assert result.warnings[0] == ()


@pytest.mark.parametrize("method", METHODS)
def test_the_predicted_class_is_the_default(model: Model, method: str) -> None:
    x = noise(3, *SIZE)
    default = explained(model, x, quick(model, method))
    c = int(model.module(x[None])[0].argmax())
    assert default.targets.index == (c,)
    assert torch.equal(default.maps, explained(model, x, quick(model, method), [c]).maps)


def test_alone_and_among_twenty_the_bits_are_the_same(model: Model) -> None:
    """Twenty requests of all methods and metrics at once, in random order, against each of them alone."""
    chance = random.Random(0)
    metrics = [metric("insertion", steps=5), metric("average-gain")]
    requests = [(METHODS[i % len(METHODS)], noise(3, *SIZE, seed=i), [i % 7]) for i in range(20)]
    chance.shuffle(requests)

    def ask(engine: Engine, method: str, x: Tensor, targets: list[int]) -> Job[Explained]:
        return submit(engine, model, x, quick(model, method), targets, metrics)

    with running(model) as engine:
        together = [ask(engine, *request) for request in requests]
        in_company = [job.future.result(timeout=120) for job in together]
        batches, rows = engine.counters.batches, engine.counters.rows
        alone = [ask(engine, *request).future.result(timeout=120) for request in requests]
        assert engine.counters.rows == 2 * rows
        assert engine.counters.batches - batches > 1.05 * batches, "together they shared batches"
    for one, other in zip(alone, in_company, strict=True):
        assert torch.equal(one.maps, other.maps)
        assert torch.equal(one.logits, other.logits)
        assert one.scores == other.scores


@pytest.mark.parametrize("method", METHODS)
def test_any_batch_size_gives_the_same_map(model: Model, method: str) -> None:
    x = noise(3, *SIZE)
    maps = []
    for size in (1, 3, 16):
        other = as_model(model.module, SIZE, batch_size=size)
        maps.append(explained(other, x, quick(other, method), [2]).maps)
    for other_map in maps[1:]:
        assert torch.allclose(maps[0], other_map, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_other_weights_give_another_map(model: Model, method: str) -> None:
    """The sanity check of Adebayo et al. 2018, arXiv:1810.03292, in its crudest form."""
    x = noise(3, *SIZE)
    other = as_model(nets.tiny_cnn(seed=1), SIZE)
    a, b = (explained(m, x, quick(m, method), [2]).maps for m in (model, other))
    assert float((a - b).abs().mean()) > 0.02


@pytest.mark.parametrize("method", METHODS)
def test_the_network_is_left_as_it_was(method: str) -> None:
    net = nets.tiny_cnn()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = as_model(net, SIZE)
    explained(model, noise(3, *SIZE), quick(model, method))
    assert not any(module._forward_hooks for module in net.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in net.parameters())
    assert not net.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("image", ["zeros", "constant", "one pixel", "huge"])
def test_degenerate_images(model: Model, method: str, image: str) -> None:
    x = torch.zeros(3, *SIZE)
    if image == "constant":
        x += 0.7
    if image == "one pixel":
        x[:, 5, 5] = 9
    if image == "huge":
        x = noise(3, *SIZE) * 1e6
    check(explained(model, x, quick(model, method), [1]))


class OnePixel(nn.Module):
    """A last layer of 1×1 behind one of 2×2; with nothing alive if told so."""

    def __init__(self, alive: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.fc = nn.Conv2d(3, 5, 8, stride=8), nn.ReLU(), nn.Linear(20, 3)
        if not alive:
            nn.init.constant_(self.conv.bias, -1e9)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.relu(self.conv(x)).flatten(1))
        return y


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_with_nothing_alive(method: str) -> None:
    model = as_model(OnePixel(alive=False), (16, 16))
    result = explained(model, noise(3, 16, 16), quick(model, method))
    check(result, (16, 16))
    assert not result.maps.any()
    assert result.warnings[0][0].startswith("degenerate")


@pytest.mark.parametrize("method", METHODS)
def test_a_map_of_two_by_two(method: str) -> None:
    model = as_model(OnePixel(alive=True), (16, 16))
    check(explained(model, noise(3, 16, 16), quick(model, method)), (16, 16))


@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_gives_no_numbers(method: str) -> None:
    net = nets.tiny_cnn()
    net.fc.weight.data[:] = torch.nan
    model = as_model(net, SIZE)
    result = explained(model, noise(3, *SIZE), quick(model, method), [0])
    check(result)


@pytest.mark.parametrize("method", METHODS)
def test_the_rows_are_those_announced(model: Model, method: str) -> None:
    """No more than `rows` promises, which is what requests are admitted by."""
    entry = registry.METHODS[method]
    with running(model) as engine:
        job = submit(engine, model, noise(3, *SIZE), quick(model, method), [1, 2])
        job.future.result(timeout=120)
    layers = model.default_layers(entry.layers == "many")
    sizes = registry.Sizes([layer.channels for layer in layers], 2, SIZE)
    assert 1 < job.rows <= 1 + entry.rows(sizes, **entry.check(QUICK.get(method, {}), ""))


@pytest.mark.parametrize("method", METHODS)
def test_it_says_what_it_is(method: str) -> None:
    entry = registry.METHODS[method]
    assert entry.title
    assert entry.summary.endswith(".")
    assert "\n" not in entry.summary
    assert entry.paper.startswith("arXiv:")
    assert all(parameter.description for parameter in entry.parameters)
    assert "→" in (entry.plan.__doc__ or ""), "shapes"


@pytest.mark.parametrize("name", sorted(registry.METRICS))
def test_metrics_say_what_they_are(name: str) -> None:
    entry = registry.METRICS[name]
    assert entry.title
    assert entry.summary.endswith(".")
    assert entry.unit in {"1", "%"}
    assert all(parameter.description for parameter in entry.parameters)


@pytest.mark.parametrize("name", sorted(registry.METRICS))
def test_metrics_lie_in_their_range(model: Model, name: str) -> None:
    top = 100.0 if registry.METRICS[name].unit == "%" else 1.0
    for seed, S in enumerate([torch.zeros(SIZE), torch.ones(SIZE), noise(*SIZE).sigmoid(), noise(5, 3).sigmoid()]):
        (score,) = explained(model, noise(3, *SIZE, seed=seed), S, [seed], [metric(name)]).scores[0]
        assert 0 <= score.value <= top
        assert all(0 <= point <= 1 for point in score.curve)
