"""The layers that are found by themselves: for VGG16 and ResNet50 those of the Poly-CAM paper."""

from __future__ import annotations

import pytest
import torch

from camserve_server import torchvision_ops  # noqa: F401
from camserve_server.models.layers import probe
from tests import nets

import torchvision  # isort: skip

PAPER = {
    "vgg16": ["features.3", "features.8", "features.15", "features.22", "features.29"],
    "vgg16_bn": ["features.5", "features.12", "features.22", "features.32", "features.42"],
    "resnet50": ["relu", "layer1", "layer2", "layer3", "layer4"],
    "resnet18": ["relu", "layer1", "layer2", "layer3", "layer4"],
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_layers(name: str) -> None:
    net = torchvision.models.get_model(name, weights=None).eval()
    _, layers, classes = probe(net, torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert [layer.name for layer in layers] == PAPER[name]
    assert [layer.height for layer in layers] == sorted((layer.height for layer in layers), reverse=True)
    assert classes == 1000


@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "squeezenet1_1"])
def test_any_plain_network_has_some(name: str) -> None:
    net = torchvision.models.get_model(name, weights=None).eval()
    spatial, layers, _ = probe(net, torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
    assert len(layers) >= 3
    assert not any(layer.signed for layer in layers)
    assert all(layer.name in spatial for layer in layers)


def test_a_module_that_runs_twice_cannot_be_named() -> None:
    net = torchvision.models.resnet18(weights=None).eval()
    spatial, _, _ = probe(net, torch.randn(1, 3, 64, 64))
    assert "layer1.0" in spatial
    assert "layer1.0.relu" not in spatial


def test_signed_layers_are_told() -> None:
    spatial, _, _ = probe(nets.tiny_cnn(), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert spatial["c2"].signed
    assert not spatial["r2"].signed
