"""Maps of both classes of a network with one output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from camserve_server.models.model import Model
from camserve_server.models.outputs import two_classes
from camserve_server.models.servable import unsupported_reason
from camserve_server.registry import METHODS
from tests import nets
from tests.support import as_model, call, explained, noise

OPTIONS: dict[str, dict[str, Any]] = {
    "integrated-gradients": {"steps": 5},
    "is-cam": {"steps": 2},
    "opti-cam": {"steps": 5},
    "rise": {"masks": 50},
    "ss-cam": {"samples": 2},
}
# docs/configuration.md names them.
ABSOLUTE = {"gradient-shap", "input-x-gradient", "integrated-gradients", "occlusion", "smooth-grad"}


def with_one_output(net: nn.Module) -> Model:
    of = replace(as_model(net), classes=2, binary=True, head="sigmoid")
    two_classes(of.module, probabilities=False)
    return of


def have_equal_maps(of: Model, method: str, *layers: str, **options: object) -> bool:
    """Return True if the maps of both classes are equal up to rounding."""
    method_call = call(of, method, layers or None, **{**OPTIONS.get(method, {}), **options})
    maps = explained(of, noise(3, 32, 32), method_call, [0, 1]).maps
    return torch.allclose(maps[0], maps[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_only_absolute_values_and_ablation_cam_have_the_same_map_for_both_classes(name: str) -> None:
    of = with_one_output(nets.tiny_cnn(classes=1))
    method = METHODS[name]
    if unsupported_reason(method, of):
        pytest.skip("the network has no such map")
    expected = name in ABSOLUTE or name == "ablation-cam" or method.class_agnostic
    assert have_equal_maps(of, name) == expected
    if any(parameter.name == "signed" for parameter in method.parameters):
        assert not have_equal_maps(of, name, signed=True)


def test_layer_cam_of_a_layer_that_only_a_normalisation_uses_is_the_same_for_both_classes() -> None:
    net: Any = nets.tiny_vit()
    net.head = nn.Linear(48, 1, bias=False)
    torch.nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(0))
    of = with_one_output(net)
    assert have_equal_maps(of, "layer-cam")
    assert not have_equal_maps(of, "layer-cam", "blocks.2.norm1")
