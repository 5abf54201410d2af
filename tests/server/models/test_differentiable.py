"""Networks with parts that are not differentiable: methods with gradients are refused, all others are served."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch
from torch import Tensor, nn

from camserve_server.engine import warmup
from camserve_server.errors import Unservable
from camserve_server.models.model import Model
from tests.support import as_model, call, explained, noise

X = noise(3, 32, 32)


class Backbone(nn.Module):
    """Network with a branch that the logits do not depend on. If `frozen`, its body runs under no_grad."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = frozen
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.unused, self.fc = nn.Conv2d(8, 4, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            A = self.body(x)
        self.unused(A)
        y: Tensor = self.fc(A.mean(dim=(2, 3)))
        return y


@pytest.fixture
def frozen() -> Model:
    return as_model(Backbone(frozen=True))


@pytest.mark.parametrize(
    ("method", "layer"),
    [("grad-cam", "body.0"), ("smooth-grad", None), ("integrated-gradients", None), ("opti-cam", "body.1")],
)
def test_methods_with_gradients_are_refused_for_a_frozen_body(frozen: Model, method: str, layer: str | None) -> None:
    with pytest.raises(Unservable, match="no_grad"):
        explained(frozen, X, call(frozen, method, [layer] if layer else None))


def test_layer_behind_the_frozen_body_is_served(frozen: Model) -> None:
    assert explained(frozen, X, call(frozen, "grad-cam", ["body"])).maps.any()
    assert explained(frozen, X, call(frozen, "score-cam", ["body"])).maps.any()


def test_layer_that_the_logits_do_not_depend_on_is_refused() -> None:
    model = as_model(Backbone(frozen=False))
    with pytest.raises(Unservable, match="does not use it"):
        explained(model, X, call(model, "grad-cam", ["unused"]))


def test_warm_up_skips_the_lanes_that_need_gradients(frozen: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "MEASURE_S", 0)
    monkeypatch.setitem(warmup.SIZES, "cpu", (4,))  # with several, small lanes would depend on the speed of the machine
    warmup.warm_up(frozen)
    assert set(frozen.batch_sizes) == {"forward", "gradient", "ascend"}
    assert not frozen.throughput["ascend"].average


def test_measurement_ends_at_the_first_size_that_does_not_fit() -> None:
    def seconds(size: int) -> Generator[None, None, float]:
        yield
        if size > 4:
            raise torch.OutOfMemoryError("no memory")
        return 1.0

    def measure(*sizes: int) -> Generator[None, None, None]:
        results.append((yield from warmup.measure_rates(seconds, sizes, 0.95)))

    results: list[dict[int, float]] = []
    assert len(list(measure(1, 2, 4, 8))) == 4, "it yields before each batch"
    assert results == [{1: 1.0, 2: 2.0, 4: 4.0}]
    assert [warmup.smallest_size(results[0], share) for share in (0.95, 0.5, 0.2)] == [4, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        list(measure(8, 16))
