"""Models, engines and requests for tests, without files or a server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server import registry
from camserve_server.engine import warmup
from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Event, Job
from camserve_server.maps import boxes
from camserve_server.models.heads import Head
from camserve_server.models.layers import Layer
from camserve_server.models.load import state_digest
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.pixels import Preprocessing
from camserve_server.models.probe import probe
from camserve_server.plan import Truth
from camserve_server.request_plan import MethodCall, MetricCall, limits, plan_request, rows_needed
from camserve_server.request_result import RequestResult

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Limit for a result that must come, in seconds: long enough for a slow machine, shorter than the time limit of pytest.
TIMEOUT_S = 240

registry.discover()


def as_model(
    net: nn.Module,
    size: tuple[int, int] = (32, 32),
    *,
    name: str = "model",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    head: Head | None = None,
    token_grid: tuple[int, int] | None = None,
) -> Model:
    """Return a model of the network, with the layers that `probe` detects. `size` is (H, W) in pixels."""
    net.eval().requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    structure = probe(net, noise(1, len(mean), *size).to(dtype), token_grid)
    return Model(
        name=name,
        source="test",
        digest=state_digest(net),
        module=net,
        device=torch.device("cpu"),
        dtype=dtype,
        preprocessing=Preprocessing(size, mean, std, "bilinear"),
        labels=(),
        classes=structure.classes,
        spatial=structure.spatial,
        layers=structure.layers,
        layer=structure.layer,
        no_layer=structure.no_layer,
        warnings=structure.warnings,
        head=head or ("sigmoid" if structure.classes == 1 else "softmax"),
        gap=structure.gap,
        precision="fp64" if dtype == torch.float64 else "fp32",
        attention=structure.attention,
        attention_prefix=structure.attention_prefix,
        attention_grid=structure.attention_grid,
        batch_sizes={"forward": batch_size, "gradient": batch_size, "ascend": batch_size},
    )


class Clock:
    """Clock that a test advances. `install` puts it in the place of `time.monotonic`.

    The event loops of other servers in this process keep the real time. Otherwise, timers that they set in the meantime
    would expire too late.
    """

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move the clock forwards."""
        self.now_s += seconds

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Clock:
        """Replace `time.monotonic` until the end of the test."""
        real = time.monotonic
        monkeypatch.setattr(asyncio.BaseEventLoop, "time", lambda loop: real())
        monkeypatch.setattr(time, "monotonic", self)
        return self


@contextmanager
def running(**options: Any) -> Iterator[Engine]:
    """Run an engine on its thread; close it at the end."""
    engine = Engine(**options)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def stopped(engine: Engine) -> Iterator[None]:
    """Keep the engine from running batches for the duration of the context."""
    reached, resume = threading.Event(), threading.Event()

    def wait() -> Iterator[None]:
        reached.set()
        assert resume.wait(TIMEOUT_S)
        yield

    done = engine.run_between_batches(wait())
    assert reached.wait(TIMEOUT_S)
    try:
        yield
    finally:
        resume.set()
        done.result(TIMEOUT_S)


def call(
    model: Model, method: str, layers: Sequence[str] | None = None, seed: int = 0, **parameters: object
) -> MethodCall:
    """Return a method call with checked parameters, on the given layers or the model's default layers."""
    entry = registry.METHODS[method]
    if entry.layers == "none":
        chosen: tuple[Layer, ...] = ()
    else:
        chosen = model.find_layers(layers, "layers") if layers else model.default_layers(entry.layers == "many")
    return MethodCall(entry, entry.check(parameters, "parameters"), chosen, seed)


def metric(name: str, seed: int = 0, **parameters: object) -> MetricCall:
    """Return a metric call with checked parameters."""
    entry = registry.METRICS[name]
    return MetricCall(entry, entry.check(parameters, "parameters"), seed)


def submit(
    engine: Engine,
    model: Model,
    x: Tensor,
    subject: MethodCall | Tensor,
    targets: Sequence[int] | int = 1,
    metrics: Sequence[MetricCall] = (),
    events: list[Event] | None = None,
    *,
    budget: int = 0,
    deadline: float | None = None,
    batch_sizes: Mapping[LaneKind, int] | None = None,
    truth: Truth | None = None,
) -> Job[RequestResult]:
    """Submit the plan of one request to the engine.

    x [C, H, W] is a preprocessed image. Without `truth`, the ground truth is a box in the middle of the image.
    """
    height, width = model.preprocessing.size
    middle = boxes.make_truth([(width / 4, height / 4, width / 2, height / 1.5)], None, (height, width))
    method = subject if isinstance(subject, MethodCall) else None
    maps = targets if isinstance(targets, int) else len(targets)
    needed = rows_needed(model, method, metrics, maps)
    return engine.submit(
        plan_request(model, model.image(x), targets, subject, metrics, truth or middle),
        model,
        rows=needed.most,
        limits=limits(model, method, needed, budget=budget, deadline=deadline),
        batch_sizes=batch_sizes,
        notify=(lambda event: None) if events is None else events.append,
    )


def explained(model: Model, x: Tensor, subject: MethodCall | Tensor, *args: Any, **kwargs: Any) -> RequestResult:
    """Return the result of a request that runs alone on its own engine."""
    with running() as engine:
        return submit(engine, model, x, subject, *args, **kwargs).future.result(TIMEOUT_S)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal values, the same for each call with the same arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def without_calls(log: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines of a captured log but those about calls.

    A server that tests share may end a cancelled call of an earlier test at any moment.
    """
    return [line for line in log if line["event"] != "call"]


@contextmanager
def full_batches() -> Iterator[None]:
    """Let servers that load their models in this context pad all batches to the size of their lane."""

    def no_smaller_size(model: Model, full: int, **_: bool) -> Generator[None, None, tuple[int, ...]]:
        yield
        return (full,)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "compare_sizes", no_smaller_size)
        yield
