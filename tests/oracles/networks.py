"""Networks and images of the oracle tests. Each process builds a network once."""

from __future__ import annotations

from functools import cache
from typing import Any

import PIL.Image
import skimage.data
import torch
from torch import Tensor, nn

from camserve_server.models.pixels import Preprocessing
from tests import nets
from tests.support import IMAGENET_MEAN, IMAGENET_STD


@cache
def network(name: str) -> Any:
    """Return a network in float32. Tests that change it must copy it.

    VGG16 and ResNet50 have random weights, calibrated on a photograph. EfficientNet-Lite0 has its trained weights.
    """
    if name.startswith("tiny"):
        return nets.tiny_cnn()
    if name == "efficientnet-lite0":
        return nets.lite0()
    tiles = photograph((256, 256)).unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4).flatten(0, 1)
    images = torch.cat([tiles, photograph((64, 64))[None]])
    return vgg16(images) if name == "vgg16" else nets.calibrated("resnet50", on=images)


def vgg16(images: Tensor) -> Any:
    """Return VGG16 with 256 instead of 4,096 hidden units in its classifier.

    A forward pass of one row through the original classifier takes as long as all convolutions, because it reads 490 MB
    of weights. No method uses the activations of the classifier.
    """
    net: Any = nets.calibrated("vgg16", on=images[:1])
    generator = torch.Generator().manual_seed(0)
    hidden, last = nn.Linear(512 * 7 * 7, 256), nn.Linear(256, 1000)
    with torch.no_grad():
        for linear in (hidden, last):
            fan_in = linear.in_features
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
            linear.bias.zero_()
        net.classifier = nn.Sequential(hidden, nn.ReLU(), last)
        last.weight.mul_(3 / net(images).std())
    return net.eval().requires_grad_(False)


def photograph(size: tuple[int, int]) -> Tensor:
    """Return a normalised photograph [3, H, W] of a cat."""
    prepare = Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    return prepare(PIL.Image.fromarray(skimage.data.chelsea()))


def tiny(size: tuple[int, int]) -> tuple[nets.TinyPoly, Tensor, int]:
    """Return a tiny network in float64, an image [1, 3, H, W] of noise and the class that the network predicts."""
    net = nets.tiny_cnn(1).double()
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2)).double()
    return net, x, int(net(x).argmax())


class Memoised(nn.Module):
    """Network that runs each distinct row once, so that several oracles of the same masks share their passes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.outputs: dict[int, Tensor] = {}

    def forward(self, row: Tensor) -> Tensor:
        """Return the logits [1, classes] of a row [1, 3, H, W]."""
        key = hash(row.numpy().tobytes())
        if key not in self.outputs:
            self.outputs[key] = self.net(row)
        return self.outputs[key]
