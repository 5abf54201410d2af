"""Detected default layers. For VGG16 and ResNet50, they are those of the Poly-CAM paper."""

from __future__ import annotations

import pytest

from camserve_server.models.probe import probe
from camserve_server.torch_setup import torchvision_ops  # noqa: F401
from tests import nets
from tests.support import noise

import torchvision  # isort: skip

PAPER = {
    "vgg16": ["features.3", "features.8", "features.15", "features.22", "features.29"],
    "vgg16_bn": ["features.5", "features.12", "features.22", "features.32", "features.42"],
    "resnet50": ["relu", "layer1", "layer2", "layer3", "layer4"],
    "resnet18": ["relu", "layer1", "layer2", "layer3", "layer4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_default_layers_are_those_of_the_paper(name: str) -> None:
    net = torchvision.models.get_model(name, weights=None).eval()
    found = probe(net, noise(1, 3, 64, 64))
    assert [layer.name for layer in found.layers] == PAPER[name]
    assert [layer.height for layer in found.layers] == sorted((layer.height for layer in found.layers), reverse=True)
    assert found.layer == found.layers[-1]
    assert found.classes == 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_other_convolutional_networks_have_default_layers(name: str) -> None:
    net = torchvision.models.get_model(name, weights=None).eval()
    found = probe(net, noise(1, 3, 96, 96))
    assert len(found.layers) >= 3
    assert not any(layer.signed for layer in found.layers)
    assert all(found.spatial[layer.name] == layer for layer in found.layers)


def test_each_call_of_a_module_that_runs_twice_is_a_separate_layer() -> None:
    spatial = probe(torchvision.models.resnet18(weights=None).eval(), noise(1, 3, 64, 64)).spatial
    assert "layer1.0" in spatial
    assert "layer1.0.relu" not in spatial
    assert [name for name in spatial if name.startswith("layer1.0.relu#")] == ["layer1.0.relu#1", "layer1.0.relu#2"]


def test_layers_with_negative_values_are_marked_as_signed() -> None:
    spatial = probe(nets.tiny_cnn(), noise(1, 3, 32, 32)).spatial
    assert spatial["c2"].signed
    assert not spatial["r2"].signed
