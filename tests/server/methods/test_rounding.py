"""Maps that consist of rounding errors."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from camserve_server.config import ModelConfig
from camserve_server.engine.job import Event
from camserve_server.engine.lanes.gradient import ROUNDING
from camserve_server.maps.products import gradient_times_activation
from camserve_server.models.load import load
from camserve_server.models.model import Model
from camserve_server.plan import MapWarning
from camserve_server.registry import METHODS
from tests import nets
from tests.support import as_model, call, explained, noise

NETS = {"tiny": nets.tiny_cnn, "vit": nets.tiny_vit}
# Ten steps, because Adam makes whole steps even from gradients that are rounding.
OPTIONS: dict[str, dict[str, Any]] = {"opti-cam": {"steps": 10}, "rise": {"masks": 500}}


class Unpadded(nn.Sequential):
    """Network whose activations are constant for an image of one colour, because its convolutions have no padding."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for channels, more in ((3, 12), (12, 16), (16, 20)):
            layers += [nn.Conv2d(channels, more, 3, stride=1 if channels == 3 else 2), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 7))


@lru_cache
def model(net: str, dtype: torch.dtype) -> Model:
    return as_model(copy.deepcopy(NETS[net]()), dtype=dtype)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_map_does_not_consist_of_rounding_errors(name: str, net: str) -> None:
    """Then the map in float64 would be another one."""
    if (name, net) in {("cam", "vit"), ("attention-rollout", "tiny"), ("raw-attention", "tiny")}:
        pytest.skip("the network has no such map")
    single, double = (
        explained(of, noise(3, 32, 32), call(of, name, **OPTIONS.get(name, {})), [1, 3])
        for of in (model(net, torch.float32), model(net, torch.float64))
    )
    assert single.warnings == double.warnings
    torch.testing.assert_close(single.maps, double.maps, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["poly-cam", "poly-cam+", "layer-cam", "hires-cam", "grad-cam", "cam", "eigen-cam"])
def test_map_is_zero_if_the_activations_are_constant(name: str) -> None:
    of = as_model(Unpadded())
    for value in (-2.1, -0.7, 0.2, 0.4, 1.9):
        result = explained(of, torch.full((3, 32, 32), value), call(of, name), [1, 3])
        assert (result.maps == 0).all()
        # The remedy for rounding errors does not help here.
        assert result.warnings == (("degenerate: the map is constant; zeros are returned",),) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "layer", "other"), [("grad-cam", "0", "1"), ("xgrad-cam", "1", "0")])
def test_map_is_zero_if_an_instance_norm_makes_its_weights_zero(
    name: str, layer: str, other: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    norm, pool = nn.InstanceNorm2d(16), nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), norm, nn.ReLU(), pool, nn.Flatten(), nn.Linear(16, 7))
    of = as_model(net, dtype=dtype)
    result = explained(of, noise(3, 32, 32), call(of, name, [layer]), [1, 3])
    assert (result.maps == 0).all()
    assert result.warnings == (("degenerate: the map is constant; zeros are returned",),) * 2
    result = explained(of, noise(3, 32, 32), call(of, name, [other]), [1, 3])
    assert (result.maps.amax(dim=(1, 2)) == 1).all()


def test_map_is_zero_if_the_only_layer_of_zoom_cam_is_constant() -> None:
    """Zoom-CAM subtracts the minimum of each layer, so that its own result does not show that it is rounding."""
    of = as_model(Unpadded())
    for value in (-0.7, 0.2, 0.4):
        result = explained(of, torch.full((3, 32, 32), value), call(of, "zoom-cam", ["5"]), [1, 3])
        assert (result.raw == 0).all()
        assert result.warnings == (("degenerate: the map is constant; zeros are returned",),) * 2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("centred", [False, True])
def test_rounding_does_not_choose_the_sign_of_eigen_cam(centred: bool, seed: int) -> None:
    torch.manual_seed(seed)
    conv, pool = nn.Conv2d(3, 24, 3, stride=4), nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(conv, nn.ReLU(), nets.ChannelNorm(), pool, nn.Flatten(), nn.Linear(24, 7))
    single, double = (
        explained(of, noise(3, 32, 32), call(of, "eigen-cam", ["2"], centred=centred), [1])
        for of in (as_model(copy.deepcopy(net), dtype=dtype) for dtype in (torch.float32, torch.float64))
    )
    torch.testing.assert_close(single.maps, double.maps, rtol=0, atol=1e-5)
    raw = double.raw.flatten()
    assert raw[raw.abs().argmax()] > 0


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["hires-cam", "zoom-cam"])
def test_map_is_zero_if_only_a_normalisation_uses_the_layer(name: str, precision: str) -> None:
    config = {"name": "vit", "source": "python:tests.nets:tiny_vit", "input_size": (32, 32), "precision": precision}
    of = load(ModelConfig.model_validate(config), torch.device("cpu"))
    of.batch_sizes |= {"forward": 4, "gradient": 4, "ascend": 4}
    result = explained(of, noise(3, 32, 32), call(of, name), [1, 3])
    assert (result.maps == 0).all()
    remedy = "in a transformer, name the normalisation that uses the output of the layer, such as blocks.11.norm1"
    assert all(remedy in text for (text,) in result.warnings)
    result = explained(of, noise(3, 32, 32), call(of, name, ["blocks.2.norm1"]), [1, 3])
    assert (result.maps.amax(dim=(1, 2)) == 1).all()
    assert result.warnings == ((), ())


def test_bound_of_rounding_depends_on_the_precision() -> None:
    """In float32, small sums are a map. In bfloat16, rounding could cause them."""
    A = torch.ones(1, 1000, 2, 2)
    A[0, :500] = -0.998
    S, is_rounding = gradient_times_activation(torch.ones_like(A), A, ROUNDING["fp32"])
    assert (S > 0.9).all() and not is_rounding.any()
    S, is_rounding = gradient_times_activation(torch.ones_like(A), A, ROUNDING["bf16"])
    assert (S == 0).all() and is_rounding.all()


def test_sums_that_are_not_finite_stay_so() -> None:
    A = noise(3, 16, 4, 4).abs()
    g = torch.ones(3, 16, 4, 4)
    g[0, 2, 1, 1], g[1, 0, 0, 0] = float("nan"), float("inf")
    S, is_rounding = gradient_times_activation(g, A, 1e-3)
    assert not is_rounding.any()
    assert S[0, 1, 1].isnan() and not S[1].isfinite().all() and S[2].isfinite().all()
    assert torch.equal(S[2], A[2].sum(dim=0).relu())


def test_rise_warns_if_the_masks_do_not_change_the_probability() -> None:
    """The masks of an image of the mean colour change nothing, so the map is their mean."""
    of = as_model(nets.tiny_cnn())
    warned: list[Event] = []
    explained(of, torch.zeros(3, 32, 32), call(of, "rise", masks=500), [1, 3], events=warned)
    texts = [event.text for event in warned if isinstance(event, MapWarning)]
    assert [text.partition(",")[0] for text in texts] == [
        f"degenerate: the map of class {c} shows the 500 random masks" for c in (1, 3)
    ]


def test_rise_warns_if_there_are_too_few_masks() -> None:
    """A budget may end it after one mask, whatever the masks change."""
    of, warned = as_model(nets.tiny_cnn()), list[Event]()
    explained(of, noise(3, 32, 32), call(of, "rise", masks=1), [1], events=warned)
    (text,) = [event.text for event in warned if isinstance(event, MapWarning)]
    assert "the probability varies too little for this number of masks" in text


def test_rise_has_no_warning_if_the_masks_change_the_probability() -> None:
    of = as_model(nets.tiny_cnn())
    warned: list[Event] = []
    result = explained(of, noise(3, 32, 32), call(of, "rise", masks=500), [1, 3], events=warned)
    assert not any(isinstance(event, MapWarning) for event in warned)
    assert result.warnings == ((), ())
