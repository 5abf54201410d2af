"""Laws for activations, gradients and probabilities that are not finite: results show them and do not look valid."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server import registry
from camserve_server.models.model import Model
from tests.support import as_model, call, explained, metric, noise

QUICK: dict[str, dict[str, Any]] = {
    "opti-cam": {"steps": 3},
    "ss-cam": {"samples": 2},
    "is-cam": {"steps": 2},
}
WITH_LAYERS = sorted(name for name, method in registry.METHODS.items() if method.layers != "none")
SCORES = ["adcc", "average-drop", "average-gain", "average-increase", "deletion", "infidelity", "insertion"]


class Spoiled(nn.Module):
    """Identity. If `value` is set, one activation of the first channel has this value instead."""

    def __init__(self) -> None:
        super().__init__()
        self.value: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations."""
        if self.value is None:
            return x
        x = x.clone()
        x[:, 0, 1, 1] = self.value
        return x


class Mended(nn.Module):
    """Network with finite logits, also if activations of its fine layer `spoiled` are not finite."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.relu, self.spoiled = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), Spoiled()
        self.pool, self.coarse, self.last = nn.MaxPool2d(4), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        A = self.spoiled(self.relu(self.fine(x)))
        A = self.pool(torch.where(A.isfinite(), A, 0.0))
        logits: Tensor = self.head(self.last(self.coarse(A)).mean(dim=(2, 3)))
        return logits


def model_of(value: float | None) -> Model:
    model = as_model(Mended())
    assert isinstance(model.module, Mended)
    model.module.spoiled.value = value
    return model


@pytest.mark.parametrize("method", WITH_LAYERS)
def test_map_of_a_layer_that_is_not_finite_is_zero_with_a_warning(method: str) -> None:
    layers = ["spoiled", "last"] if registry.METHODS[method].layers == "many" else ["spoiled"]
    results = []
    for value in (None, math.nan):
        model = model_of(value)
        results.append(explained(model, noise(3, 32, 32), call(model, method, layers, **QUICK.get(method, {})), [1]))
    finite, spoiled = results
    assert finite.maps.any()
    assert not spoiled.maps.any()
    assert "degenerate: the map is not finite; zeros are returned" in spoiled.warnings[0]
    assert 0 <= spoiled.share <= 1


@pytest.mark.parametrize("name", SCORES)
def test_score_of_a_probability_that_is_not_a_number_is_none(name: str) -> None:
    model = as_model(Mended())
    assert isinstance(model.module, Mended)
    model.module.head.weight.data[:] = math.nan
    model.module.head.bias.data[:] = math.nan
    S = torch.linspace(0, 1, 32 * 32).view(32, 32)
    subject: Any = call(model, "random") if name == "adcc" else S
    result = explained(model, noise(3, 32, 32), subject, [1], [metric(name)])
    assert math.isnan(result.scores[0][0].value)


def test_zero_map_scaled_by_its_maximum_is_constant() -> None:
    model = as_model(Mended())
    assert isinstance(model.module, Mended)
    model.module.last.register_forward_hook(lambda module, args, output: 0 * output)
    result = explained(model, noise(3, 32, 32), call(model, "opti-cam", ["last"], norm="max"), [1])
    assert result.warnings[0] == ("degenerate: the map is constant; zeros are returned",)
