"""Laws for every registered method and metric. The tests find new methods in the registry."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camserve.map_format import restored
from camserve_server import registry
from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Job, Limits
from camserve_server.errors import InvalidArgument, OutOfRange
from camserve_server.metrics import road
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.servable import unsupported_reason
from camserve_server.plan import MetricResult
from camserve_server.request_plan import MethodCall, plan_request, rows_needed
from camserve_server.request_result import RequestResult
from camserve_server.service.map_format import native_maps
from tests import nets
from tests.support import TIMEOUT_S, as_model, call, explained, metric, noise, running, stopped, submit

METHODS = sorted(registry.METHODS)
METRICS = sorted(registry.METRICS)
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, int]]] = {
    "cnn": (nets.tiny_cnn, (37, 29)),
    "vit": (nets.tiny_vit, (32, 32)),
}
CONTROLS = {"center-gaussian", "fake-cam", "random"}  # They do not use the network.
SMALL: dict[LaneKind, int] = {"forward-small": 2, "gradient-small": 2}
QUICK: dict[str, dict[str, Any]] = {
    "occlusion": {"window": 9, "stride": 5},
    "opti-cam": {"steps": 12},
    "rise": {"masks": 80},
    "ss-cam": {"samples": 3},
    "is-cam": {"steps": 3},
    "integrated-gradients": {"steps": 8},
    "smooth-grad": {"samples": 6},
    "smooth-grad-cam++": {"samples": 8},
    "gradient-shap": {"samples": 6},
}


@cache
def model_of(network: str, seed: int = 0, batch_size: int = 4) -> Model:
    net, size = NETWORKS[network]
    return as_model(net(seed), size, batch_size=batch_size)


def with_sizes(model: Model, sizes: dict[LaneKind, int]) -> Model:
    """Return the model with further batch sizes."""
    return replace(model, batch_sizes={**model.batch_sizes, **sizes})


def served(method: str, network: str) -> bool:
    return not unsupported_reason(registry.METHODS[method], model_of(network))


# Every method on each network that can serve it.
CASES = [(network, method) for network in NETWORKS for method in METHODS if served(method, network)]
# `make test-fast` runs each method on one network.
each = pytest.mark.parametrize(
    ("network", "method"),
    [
        pytest.param(network, method, marks=[pytest.mark.slow] if network == "vit" and served(method, "cnn") else [])
        for network, method in CASES
    ],
)


@pytest.fixture
def model(network: str) -> Model:
    return model_of(network)


@pytest.fixture
def x(model: Model) -> Tensor:
    # For some images, the signed activations of a transformer give Grad-CAM++ a map of zeros. Not for this one.
    return noise(3, *model.preprocessing.size, seed=1)


def quick(model: Model, method: str, **more: Any) -> MethodCall:
    if method in {"hires-cam", "zoom-cam"} and "blocks.2.norm1" in model.spatial:
        # Only this normalisation uses the default layer of the transformer, so the sum of its products is zero.
        more.setdefault("layers", ["blocks.2.norm1"])
    return call(model, method, **QUICK.get(method, {}), **more)


def test_every_method_has_a_case() -> None:
    assert {method for _, method in CASES} == set(METHODS)


def check(result: RequestResult, size: tuple[int, int]) -> None:
    """Check shape, type and range of the maps."""
    assert result.maps.shape == (len(result.targets), *size)
    assert result.maps.dtype == torch.float32
    assert result.maps.isfinite().all()
    assert 0 <= float(result.maps.min()) <= float(result.maps.max()) <= 1


@each
def test_maps_have_the_right_shape_range_and_targets(model: Model, method: str, x: Tensor) -> None:
    likeliest = model.module(x[None])[0].argsort(descending=True).tolist()[:2]
    result = explained(model, x, quick(model, method), likeliest)
    check(result, model.preprocessing.size)
    assert result.targets.index == tuple(likeliest)
    assert result.share == 1
    assert float(result.maps[0].max()) > 0
    warnings = [warning.partition(" and ")[0] for warning in result.warnings[0]]
    assert warnings == ["degenerate: the map is nearly even"] * (method == "fake-cam"), "other maps have no warnings"
    alike = torch.equal(result.maps[0], result.maps[1])
    assert alike == registry.METHODS[method].class_agnostic, "only class-agnostic methods have equal maps"


@each
def test_number_of_targets_selects_the_likeliest_classes(model: Model, method: str, x: Tensor) -> None:
    likeliest = model.module(x[None])[0].argsort(descending=True).tolist()[:3]
    by_number = explained(model, x, quick(model, method), 3)
    assert by_number.targets.index == tuple(likeliest)
    assert torch.equal(by_number.maps, explained(model, x, quick(model, method), likeliest).maps)


@each
def test_other_targets_do_not_change_a_map(model: Model, method: str, x: Tensor) -> None:
    together = explained(model, x, quick(model, method), [2, 5, 0])
    alone = explained(model, x, quick(model, method), [5])
    assert torch.allclose(together.maps[1], alone.maps[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("small", [{}, SMALL], ids=["one size", "small lanes"])
@pytest.mark.parametrize("network", NETWORKS)
def test_concurrent_requests_do_not_change_the_bits(network: str, small: dict[LaneKind, int]) -> None:
    """Requests of all methods run concurrently in random order, then one by one."""
    methods = [method for n, method in CASES if n == network]
    model = with_sizes(model_of(network), small)
    size = model.preprocessing.size
    metrics = [metric("insertion", steps=5), metric("average-gain")]
    requests = [(methods[i % len(methods)], noise(3, *size, seed=i), [i % 7]) for i in range(len(methods) + 7)]
    random.Random(0).shuffle(requests)

    def ask(engine: Engine, method: str, x: Tensor, targets: list[int]) -> Job[RequestResult]:
        return submit(engine, model, x, quick(model, method), targets, metrics)

    with running() as engine:
        with stopped(engine):  # so that no request ends before the last one arrives
            together = [ask(engine, *request) for request in requests]
        in_company = [job.future.result(timeout=TIMEOUT_S) for job in together]
        batches, rows = engine.counters.batches, engine.counters.rows
        alone = [ask(engine, *request).future.result(timeout=TIMEOUT_S) for request in requests]
        assert engine.counters.rows == 2 * rows
        assert engine.counters.batches - batches > 1.05 * batches, "concurrent requests must share batches"
    for one, other in zip(alone, in_company, strict=True):
        assert torch.equal(one.maps, other.maps)
        assert torch.equal(one.logits, other.logits)
        assert one.scores == other.scores


@pytest.mark.slow
@each
def test_batch_size_does_not_change_the_map(network: str, method: str, x: Tensor) -> None:
    maps = []
    for size in (1, 3, 16):
        other = model_of(network, batch_size=size)
        maps.append(explained(other, x, quick(other, method), [2]).maps)
    for other_map in maps[1:]:
        assert torch.allclose(maps[0], other_map, atol=1e-4)


@pytest.mark.slow
@each
def test_batch_sizes_of_a_receipt_reproduce_its_bits(network: str, method: str, x: Tensor) -> None:
    """Lanes with different batch sizes can run in one engine."""
    plain, large = model_of(network, batch_size=3), model_of(network, batch_size=16)
    for theirs, ours in ((plain, large), (with_sizes(plain, SMALL), large), (plain, with_sizes(large, SMALL))):
        expected = explained(theirs, x, quick(theirs, method), [2])
        replayed = explained(ours, x, quick(ours, method), [2], batch_sizes=theirs.batch_sizes)
        assert torch.equal(replayed.maps, expected.maps)


@each
def test_other_weights_change_the_map(network: str, method: str, x: Tensor) -> None:
    """A simple form of the sanity check of Adebayo et al. 2018, arXiv:1810.03292."""
    a, b = (explained(m, x, quick(m, method), [2]).maps for m in (model_of(network), model_of(network, seed=1)))
    if method in CONTROLS:
        assert torch.equal(a, b), "a control does not depend on the network"
    else:
        assert float((a - b).abs().mean()) > 0.02


@each
def test_map_depends_on_no_randomness_except_the_seed(network: str, model: Model, method: str, x: Tensor) -> None:
    # The gradients of the last layer of tiny_cnn do not depend on the image and its noise.
    layers = ["r2"] if network == "cnn" and registry.METHODS[method].layers == "one" else None
    first, again, other = (
        explained(model, x, quick(model, method, layers=layers, seed=seed), [2]).maps for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert torch.equal(first, other) != registry.METHODS[method].seeded


@each
def test_budget_limits_the_rows(model: Model, method: str, x: Tensor) -> None:
    with running() as engine:
        whole = submit(engine, model, x, quick(model, method), [2])
        full = whole.future.result(timeout=TIMEOUT_S)
        entry, scores = registry.METHODS[method], [metric("average-gain")]
        if entry.min_rows is None:
            if whole.rows > 1:
                with pytest.raises(OutOfRange, match="cannot stop early"):
                    submit(engine, model, x, quick(model, method), [2], budget=whole.rows - 1)
            return
        half = submit(engine, model, x, quick(model, method), [2], scores, budget=whole.rows // 2)
        cut = half.future.result(timeout=TIMEOUT_S)
        assert half.rows <= whole.rows // 2
        assert 0 < cut.share < 1
        check(cut, model.preprocessing.size)
        again = submit(engine, model, x, quick(model, method), [2], budget=half.rows_at_early_stop).future.result(
            timeout=TIMEOUT_S
        )
        assert torch.equal(cut.maps, again.maps), "the budget of the receipt reproduces the map"
        enough = submit(engine, model, x, quick(model, method), [2], budget=whole.rows)
        assert torch.equal(enough.future.result(timeout=TIMEOUT_S).maps, full.maps)
        assert enough.rows_at_early_stop == 0
        with pytest.raises(OutOfRange, match="at least"):
            submit(engine, model, x, quick(model, method), [2], budget=1)


@each
def test_network_is_unchanged_after_a_request(network: str, method: str, x: Tensor) -> None:
    model = model_of(network)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    explained(model, x, quick(model, method))
    modules = [*model.module.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.module.parameters())
    assert not any(module.training for module in modules)
    assert all(torch.equal(value, model.module.state_dict()[name]) for name, value in before.items())


@pytest.mark.slow
@each
@pytest.mark.parametrize("image", ["zeros", "constant", "one pixel", "huge", "overflowing"])
def test_degenerate_images_give_valid_maps(model: Model, method: str, image: str) -> None:
    size = model.preprocessing.size
    x = torch.zeros(3, *size)
    if image == "constant":
        x += 0.7
    if image == "one pixel":
        x[:, 5, 5] = 9
    if image == "huge":
        x = noise(3, *size) * 1e6
    if image == "overflowing":  # A tensor is not preprocessed.
        x = noise(3, *size).clamp(-1, 1) * 3e38
    check(explained(model, x, quick(model, method), [1]), size)


@each
def test_map_is_restored_from_its_native_resolution_or_refused(model: Model, method: str, x: Tensor) -> None:
    entry = registry.METHODS[method]
    size = model.preprocessing.size
    variants: list[dict[str, Any]] = [{p.name: choice} for p in entry.parameters for choice in p.choices]
    for parameters in variants or [{}]:
        method_call = quick(model, method, **parameters)
        result = explained(model, x, method_call, 2)
        assert entry.own_scaling(**method_call.parameters) == result.own_scaling
        if result.own_scaling:
            with pytest.raises(InvalidArgument, match=r"map_format\.native"):
                native_maps(result.raw, result.maps, own_scaling=True)
            continue
        for native, S in zip(native_maps(result.raw, result.maps, own_scaling=False), result.maps, strict=True):
            assert native.shape in (result.raw.shape[-2:], size)
            back = native.numpy() if native.shape == size else restored(native.numpy(), size)
            np.testing.assert_allclose(back, S, rtol=0, atol=1e-6)


class OnePixel(nn.Module):
    """Network with a last layer of 2×2 positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.fc = nn.Conv2d(3, 5, 8, stride=8), nn.ReLU(), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.relu(self.conv(x)).flatten(1))
        return y


on_one_pixel = pytest.mark.parametrize(
    "method", [m for m in METHODS if not unsupported_reason(registry.METHODS[m], as_model(OnePixel(), (16, 16)))]
)


@on_one_pixel
def test_dead_layer_gives_zeros_with_a_warning(method: str) -> None:
    model = as_model(OnePixel(), (16, 16))
    network: Any = model.module
    nn.init.constant_(network.conv.bias, -1e9)
    result = explained(model, noise(3, 16, 16), quick(model, method))
    check(result, (16, 16))
    if method in {*CONTROLS, "rise"}:
        return  # These maps do not need activations.
    assert not result.maps.any()
    assert result.warnings[0][0].startswith("degenerate")


@on_one_pixel
def test_layer_of_two_by_two_gives_a_valid_map(method: str) -> None:
    model = as_model(OnePixel(), (16, 16))
    check(explained(model, noise(3, 16, 16), quick(model, method)), (16, 16))


@each
def test_network_with_nan_logits_gives_valid_maps(network: str, method: str, x: Tensor) -> None:
    net, size = NETWORKS[network]
    broken = net(0)
    [m for m in broken.modules() if isinstance(m, nn.Linear)][-1].weight.data[:] = torch.nan
    model = as_model(broken, size)
    if served(method, network) and not unsupported_reason(registry.METHODS[method], model):
        check(explained(model, x, quick(model, method), [0]), size)


@each
def test_rows_do_not_exceed_the_announced_number(model: Model, method: str, x: Tensor) -> None:
    """Admission relies on `rows`."""
    method_call = quick(model, method)
    with running() as engine:
        job = submit(engine, model, x, method_call, [1, 2])
        job.future.result(timeout=TIMEOUT_S)
    assert 1 <= job.rows <= rows_needed(model, method_call, (), 2).most
    entry = registry.METHODS[method]
    sizes = registry.Sizes([layer.channels for layer in method_call.layers], 2, model.preprocessing.size)
    if entry.min_rows is not None:
        assert 1 <= entry.min_rows(sizes, **method_call.parameters) <= entry.rows(sizes, **method_call.parameters)


SECTIONS = ("Args:", "Returns:", "Raises:", "Equations:", "Advice:")


def check_published(entry: registry.Entry) -> None:
    """Check the texts that ListMethods and ListMetrics return, and the docstring that contains them."""
    assert entry.title
    assert entry.summary.endswith(".")
    assert "\n" not in entry.summary
    for text in (entry.summary, entry.equations, entry.advice, *(p.description for p in entry.parameters)):
        assert not any(section in text for section in SECTIONS), "sections do not leak into published texts"
    assert all(parameter.description for parameter in entry.parameters)
    if entry.plan.__module__.startswith("camserve_server."):
        assert all(parameter.description.endswith(".") for parameter in entry.parameters)


@pytest.mark.parametrize("method", METHODS)
def test_method_publishes_its_texts(method: str) -> None:
    entry = registry.METHODS[method]
    check_published(entry)
    assert entry.paper.startswith(("arXiv:", "doi:"))
    assert "=" in entry.equations
    assert entry.advice.endswith(".")
    if entry.plan.__module__.startswith("camserve_server."):
        assert entry.advice.startswith(("Use it", "A control"))
    assert "[T, " in (entry.plan.__doc__ or ""), "the docstring states the shapes of the maps"


@pytest.mark.parametrize("name", METRICS)
def test_metric_publishes_its_texts(name: str) -> None:
    entry = registry.METRICS[name]
    check_published(entry)
    assert entry.unit in {"1", "%"}


QUICK_METRICS = {
    **{f"randomisation-{name}": {"steps": 2} for name in ("hog", "spearman", "ssim")},
    **{name: {"steps": 40} for name in ("insertion", "deletion", "insertion-deletion")},
    "sensitivity-max": {"samples": 4},
}
RANGES = {
    "saliency-metric": (-3, 100),
    "sensitivity-max": (0, 100),
    "infidelity": (0, 1e4),
    "insertion-deletion": (-1, 1),
    "aopc": (-1, 1),
    "road": (-1, 1),
    "randomisation-hog": (-1, 1),
    "randomisation-spearman": (-1, 1),
    "randomisation-ssim": (-1, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("network", NETWORKS)
def test_metric_values_lie_in_their_range(model: Model, name: str) -> None:
    size = model.preprocessing.size
    low, high = RANGES.get(name, (0, 100 if registry.METRICS[name].unit == "%" else 1))
    subjects: list[Tensor | MethodCall]
    if registry.METRICS[name].needs_explainer:
        subjects = [quick(model, method) for method in ("grad-cam", "fake-cam", "occlusion", "eigen-cam")]
    else:
        subjects = [torch.zeros(size), torch.ones(size), noise(*size).sigmoid(), noise(5, 3).sigmoid()]
    for seed, subject in enumerate(subjects):
        (score,) = explained(
            model, noise(3, *size, seed=seed), subject, [seed], [metric(name, **QUICK_METRICS.get(name, {}))]
        ).scores[0]
        assert low <= score.value <= high
        assert all(min(low, 0) <= point <= 1 for point in score.curve)


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("network", NETWORKS)
def test_metric_depends_only_on_the_seed_and_keeps_the_announced_rows(model: Model, name: str, x: Tensor) -> None:
    method_call, entry = quick(model, "smooth-grad"), registry.METRICS[name]
    with running() as engine:

        def score(seed: int) -> MetricResult:
            scored = [metric(name, seed=seed, **QUICK_METRICS.get(name, {}))]
            job = submit(engine, model, x, method_call, [1], scored)
            result = job.future.result(timeout=TIMEOUT_S)
            assert job.rows <= rows_needed(model, method_call, scored, 1).most
            return result.scores[0][0]

        first, again, other = score(1), score(1), score(2)
    assert first == again
    assert (first == other) != entry.seeded


def test_map_cut_by_a_deadline_can_be_reproduced() -> None:
    """The coarsest layer is dead, so the first level of Poly-CAM has no rows."""
    net = nets.tiny_cnn()
    model = as_model(net)
    assert net.c3.bias is not None
    nn.init.constant_(net.c3.bias, -1e9)
    x, method_call = noise(3, 32, 32), call(model, "poly-cam")
    with running() as engine:
        plan = plan_request(model, model.image(x), [2], method_call, ())
        late = engine.submit(plan, model, rows=100, limits=Limits(answer_early_from=time.monotonic()))
        cut = late.future.result(timeout=TIMEOUT_S)
        again = submit(engine, model, x, method_call, [2], budget=late.rows_at_early_stop).future.result(
            timeout=TIMEOUT_S
        )
    assert 0 < cut.share < 1
    assert torch.equal(cut.maps, again.maps)


@pytest.mark.parametrize("signs", [1, -1])
def test_road_ends_for_extreme_pixels(signs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an early end, the solver would take one step per pixel, 50,176 steps."""
    steps, sums = 0, road._Binomial.__call__

    def counted(self: road._Binomial, values: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return sums(self, values)

    monkeypatch.setattr(road._Binomial, "__call__", counted)
    x = torch.full((3, 224, 224), 3e38)
    x[:, ::2] *= signs
    missing = noise(224, 224) < 0
    assert road.imputed(x, missing).shape == x.shape
    assert road.imputed(noise(3, 224, 224), missing).isfinite().all()
    assert 0 < steps < 2_000


@pytest.mark.parametrize("method", METHODS)
def test_no_parameter_blocks_the_engine_before_the_first_row(method: str) -> None:
    """All callers wait while a plan computes, so it must yield soon even with the largest parameters."""
    entry, model = registry.METHODS[method], as_model(nets.tiny_vit() if "attention" in method else nets.tiny_cnn())
    most = {p.name: int(p.range.maximum) for p in entry.parameters if type(p.default) is int and p.range}
    with running() as engine:
        begun = time.process_time()  # Other processes must not fail the test.
        job = submit(engine, model, noise(3, 32, 32), call(model, method, None, **most))
        submit(engine, model, noise(3, 32, 32), call(model, "grad-cam"), 1).future.result(timeout=TIMEOUT_S)
        engine.cancel(job)
        assert time.process_time() - begun < 15
