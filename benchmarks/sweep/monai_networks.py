"""Factories of MONAI's 2-D classifiers of grey-scale images, with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NAMES = ("densenet121", "efficientnet_b0", "resnet18", "seresnet50", "vit")
_CLASSES = 5


def _factory(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        nets: Any = importlib.import_module("monai.networks.nets")
        network: nn.Module = getattr(nets, kind)(spatial_dims=2, **options)
        return network

    return build


densenet121 = _factory("DenseNet121", in_channels=1, out_channels=_CLASSES)
efficientnet_b0 = _factory(
    "EfficientNetBN", model_name="efficientnet-b0", pretrained=False, in_channels=1, num_classes=_CLASSES
)
resnet18 = _factory("resnet18", n_input_channels=1, num_classes=_CLASSES)
seresnet50 = _factory("SEResNet50", in_channels=1, num_classes=_CLASSES)
vit = _factory("ViT", in_channels=1, img_size=224, patch_size=16, classification=True, num_classes=_CLASSES)
