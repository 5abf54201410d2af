"""Maps that do not depend on the class because all channels have nearly the same weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.engine.job import Event
from camserve_server.maps.channels import have_equal_weights
from camserve_server.plan import MapWarning
from tests import nets
from tests.support import as_model, call, explained, noise

OPTIONS: dict[str, dict[str, Any]] = {"opti-cam": {"steps": 5}, "ss-cam": {"samples": 2}, "is-cam": {"steps": 2}}
METHODS = ["score-cam", "ss-cam", "is-cam", "poly-cam", "poly-cam+", "opti-cam"]


def warned(
    net: nn.Module, x: Tensor, method: str, targets: Sequence[int], layers: list[str] | None = None, **options: object
) -> list[str]:
    """Return the warnings about equal weights, up to the class."""
    of, events = as_model(net, mean=(0.0, 0.0, 0.0)), list[Event]()
    explained(of, x, call(of, method, layers, **{**OPTIONS.get(method, {}), **options}), targets, events=events)
    texts = [event.text for event in events if isinstance(event, MapWarning)]
    return [text.partition(" is the sum of all channels")[0] for text in texts if "is the sum" in text]


def warnings_about(*classes: int) -> list[str]:
    return [f"degenerate: the map of class {c}" for c in classes]


@pytest.mark.parametrize("method", METHODS)
def test_a_black_image_of_a_network_without_mean_has_a_warning(method: str) -> None:
    """Every mask of it is the same image."""
    assert warned(nets.tiny_cnn(), torch.zeros(3, 32, 32), method, [1, 3]) == warnings_about(1, 3)
    assert warned(nets.tiny_cnn(), noise(3, 32, 32), method, [1, 3]) == []


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.1}, {"variant": "official"}])
@pytest.mark.parametrize("method", ["poly-cam", "poly-cam+"])
def test_a_class_whose_probability_is_always_nearly_one_has_a_warning(method: str, options: dict[str, Any]) -> None:
    net = nets.tiny_cnn()
    net.fc.bias[3] = 30
    assert warned(net, noise(3, 32, 32), method, [1, 3], **options) == warnings_about(3)


def test_weights_are_equal_only_if_there_are_several_above_zero() -> None:
    w, A = torch.tensor([[1.0, 1.0, 0.0, 1e-30], [0.9995, 0.998, 0.0, 1e-30]]), torch.ones(2, 4, 4)
    assert have_equal_weights(w, A).tolist() == [True, False, False, True]
    assert have_equal_weights(w[:1], A[:1]).tolist() == [False] * 4
    assert have_equal_weights(w * torch.nan, A).tolist() == [False] * 4


def test_small_differences_of_weights_decide_the_map_of_channels_that_cancel() -> None:
    torch.manual_seed(0)
    conv, pool, linear = nn.Conv2d(3, 24, 3, stride=4), nn.AdaptiveAvgPool2d(1), nn.Linear(24, 7)
    linear.weight.data *= 1e-3  # masks hardly change the probabilities
    net = nn.Sequential(conv, nets.ChannelNorm(), pool, nn.Flatten(), linear)
    of = as_model(net, mean=(0.0, 0.0, 0.0))
    first, second = explained(of, noise(3, 32, 32), call(of, "score-cam", ["1"]), [1, 3]).maps
    assert (first - second).abs().max() > 0.5
    assert warned(net, noise(3, 32, 32), "score-cam", [1, 3], layers=["1"]) == []
