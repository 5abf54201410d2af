"""Served methods against their oracles on VGG16, ResNet50 and EfficientNet-Lite0, with few rows, for a photograph.

test_served_methods.py contains the oracles and tests all parameters. test_methods.py tests the other methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from camserve_server.registry import METHODS
from tests.oracles.test_served_methods import F32, F64, case, check, likeliest


@dataclass(frozen=True)
class Layers:
    """Layers of a network for methods of `one` layer, of `many` layers, or with one pass per channel (`narrow`)."""

    one: str
    many: tuple[str, ...]
    narrow: str


LAYERS = {
    "vgg16": Layers("features.15", ("features.8", "features.15", "features.29"), "features.3"),
    "resnet50": Layers("layer2", ("relu", "layer1", "layer4"), "relu"),
    "efficientnet-lite0": Layers("bn2", ("blocks.1.0.bn1", "blocks.3.0.bn1", "bn2"), "bn1"),
}
FEW: dict[str, dict[str, Any]] = {
    "cam": {},
    "eigen-cam": {},
    "grad-cam++": {},
    "gradient-shap": {"samples": 2, "sigma": 0.3},
    "hires-cam": {},
    "input-x-gradient": {},
    "integrated-gradients": {"steps": 2},
    "layer-cam": {},
    "occlusion": {"window": 32, "stride": 20},
    "rise": {"masks": 6, "cells": 4, "keep": 0.5},
    "smooth-grad": {"samples": 2, "sigma": 0.3},
    "smooth-grad-cam++": {"samples": 2},
    "xgrad-cam": {},
    "zoom-cam": {},
}
NETWORKS = [
    ("vgg16", F32, 1e-4),
    ("resnet50", F64, 1e-6),
    ("resnet50", F32, 3e-2),  # Fifty random layers amplify rounding.
    ("efficientnet-lite0", F32, 1e-4),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance", "method"),
    [
        pytest.param(*network, method, id=f"{network[0]}-{network[1]}-{method}".replace("torch.", ""))
        for network in NETWORKS
        for method in FEW
        if (network[0], method) != ("vgg16", "cam")  # VGG16 has no global average pooling.
    ],
)
def test_two_classes_on_large_networks(name: str, dtype: torch.dtype, tolerance: float, method: str) -> None:
    network, layers = case(name, dtype), LAYERS[name]
    seen = {"none": (), "one": (layers.one,), "many": layers.many}[METHODS[method].layers]
    first, second, *_ = likeliest(network)
    check(network, method, seen, FEW[method], [second, first], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ablation-cam", {}), ("is-cam", {"steps": 2}), ("ss-cam", {"samples": 1})],
    ids=["ablation-cam", "is-cam", "ss-cam"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_methods_with_a_pass_per_channel(name: str, method: str, parameters: dict[str, Any]) -> None:
    network = case(name, F32)
    first, *_ = likeliest(network)
    check(network, method, (LAYERS[name].narrow,), parameters, [first], 1e-4)
