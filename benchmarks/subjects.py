"""The networks that are measured, and the photograph."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import PIL.Image
import skimage.data
import torch
from torch import Tensor, nn

from benchmarks.limit import Limit, find_limit
from benchmarks.timing import alone
from camserve_server import registry
from camserve_server.config import ModelConfig, embedded_model
from camserve_server.engine.warmup import warm_up
from camserve_server.models.layers import Layer
from camserve_server.models.load import load
from camserve_server.models.model import LaneKind, Model
from camserve_server.models.pixels import Preprocessing, from_pixels
from camserve_server.models.sources import build_network
from camserve_server.plan import Image
from camserve_server.registry import METHODS, Value
from camserve_server.request_plan import MethodCall

registry.discover()
nets: Any = importlib.import_module("tests.nets")  # not typed as strictly


@dataclass(eq=False)
class Subject:
    """A network as it is served, and as it is made, contiguous, for the peers; and an image.

    `limit` is the plain forward pass as fast as it gets.
    """

    model: Model
    made: nn.Module
    x: Tensor
    seconds: float
    config: ModelConfig

    @property
    def name(self) -> str:
        """As the tables call it."""
        return self.model.name

    @cached_property
    def image(self) -> Image:
        """The image, preprocessed, on the device."""
        return self.model.image(self.x)

    @cached_property
    def limit(self) -> Limit:
        """Found when it is first asked for."""
        return alone(find_limit, self.made, self.model.module, self.image.tensor, self.seconds / 4)

    def in_float64(self) -> Subject:
        """The same, to see that what diverges in float32 agrees; a row a batch."""
        config = self.config.model_copy(update={"precision": ("fp64",)})
        model, made = alone(_loaded, config, self.model.device)
        model.batch_sizes.update(dict.fromkeys(get_args(LaneKind), 1))
        return Subject(model, made, self.x, self.seconds, config)

    def activations(self, layers: Sequence[Layer]) -> list[Tensor]:
        """Of each layer, [K, h, w], on the image."""
        found: list[Tensor] = nets.activations(self.made, self.image.tensor[None], [layer.name for layer in layers])
        return found

    def call(self, method: str, layers: tuple[str, ...] = (), **parameters: Value) -> MethodCall:
        """A method on those layers, or on the model's own."""
        entry = METHODS[method]
        many = entry.layers == "many"
        found = self.model.find_layers(layers, "") if layers else self.model.default_layers(many)
        return MethodCall(entry, entry.check(parameters, ""), found)


def photograph() -> PIL.Image.Image:
    """A cat: scikit-image's, CC0."""
    return from_pixels(skimage.data.chelsea())


def resnet50() -> nn.Module:
    """Random weights, with activations and logits of a trained network's scale on the photograph."""
    return calibrated("resnet50")


def vgg16() -> nn.Module:
    """Random weights, with logits of a trained network's scale on the photograph."""
    return calibrated("vgg16")


def calibrated(name: str) -> nn.Module:
    """On the photograph and seven variants of it, [8, 3, 224, 224]: turned, mirrored and shifted."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = Preprocessing((224, 224), mean, std, "bilinear")(photograph())
    turned = [x.rot90(k, (1, 2)) for k in range(4)]
    net: nn.Module = nets.calibrated(name, on=torch.stack([*turned, *(x.flip(2).roll(16 * k, 1) for k in range(4))]))
    return net


PRECISION: Any = ("fp32", "bf16")
CONFIGS = {
    "efficientnet-lite0": embedded_model().model_copy(update={"precision": PRECISION}),
    "resnet50": ModelConfig(name="resnet50", source="python:benchmarks.subjects:resnet50", precision=PRECISION),
    "vgg16": ModelConfig(name="vgg16", source="python:benchmarks.subjects:vgg16", precision=PRECISION),
}


def subject(name: str, device: torch.device, seconds: float) -> Subject:
    """Loaded and warm, as the server has it."""
    return from_config(CONFIGS[name], device, seconds)


def from_config(config: ModelConfig, device: torch.device, seconds: float) -> Subject:
    """As the server does it."""
    model, made = alone(_loaded, config, device)
    alone(warm_up, model, config.batch_size)
    return Subject(model, made, model.preprocessing(photograph()), seconds, config)


def _loaded(config: ModelConfig, device: torch.device) -> tuple[Model, nn.Module]:
    """The network as it is served, and as it is made."""
    model = load(config, device)
    return model, made(config, device, model.dtype)[0]


def made(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Image]:
    """The network as it is made, contiguous, and the photograph as its input."""
    net = build_network(config, "models").eval().requires_grad_(False).to(device, dtype)
    preprocessing = Preprocessing(config.input_size, config.mean, config.std, config.interpolation)
    columns = (Preprocessing.column(values) for values in (config.mean, config.std))
    return net, Image(*(values.to(device, dtype) for values in (preprocessing(photograph()), *columns)))
