"""Networks and photograph of the benchmarks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ParamSpec, TypeVar, get_args

import PIL.Image
import skimage.data
import torch
from torch import Tensor, nn

from benchmarks.arithmetic import tf32, with_dtype
from benchmarks.limit import Limit, find_limit
from benchmarks.timing import run_on_thread
from camserve_server import registry
from camserve_server.config import ModelConfig, embedded_model
from camserve_server.engine.warmup import warm_up
from camserve_server.models.layers import Layer
from camserve_server.models.load import load
from camserve_server.models.model import Model, Passes
from camserve_server.models.pixels import Preprocessing
from camserve_server.models.sources import build_network
from camserve_server.plan import Image, as_row
from camserve_server.registry import METHODS, Value
from camserve_server.request_plan import MethodCall

registry.discover()
nets: Any = importlib.import_module("tests.nets")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False)
class Subject:
    """Network under test: the served model, the original network for other implementations, and an image.

    Attributes:
        model: The model as the server loads it.
        made: The original network in contiguous memory format.
        x: The preprocessed image [3, H, W].
        seconds: Approximate duration of one measurement.
        config: Configuration of the model.
    """

    model: Model
    made: nn.Module
    x: Tensor
    seconds: float
    config: ModelConfig

    @property
    def name(self) -> str:
        """Name of the network in tables."""
        return self.model.name

    @cached_property
    def image(self) -> Image:
        """The preprocessed image on the device."""
        return self.model.image(self.x)

    @cached_property
    def limit(self) -> Limit:
        """The fastest plain forward pass, measured on first use."""
        model = self.model
        x = self.image.tensor.to(model.compute_dtype)
        compiled = model.compile and model.device.type == "cuda"
        measure = partial(find_limit, tf32=model.precision == "tf32", compiled=compiled)
        return run_on_thread(measure, self.made, model.module, x, self.seconds / 4)

    @cached_property
    def at_precision(self) -> nn.Module:
        """The original network at the precision of the served model."""
        return with_dtype(self.made, self.model.compute_dtype)

    def alike(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run another implementation in this process on a new thread, with the TF32 setting of the served model."""
        with tf32(self.model.precision == "tf32"):
            return run_on_thread(lambda: work(*args, **kwargs))

    def in_float64(self) -> Subject:
        """Return the same network in float64 with batch size 1, to compare results that diverge in float32."""
        config = self.config.model_copy(update={"precision": ("fp64",)})
        model, made = run_on_thread(_loaded, config, self.model.device)
        model.batch_sizes.update(dict.fromkeys(get_args(Passes), 1))
        return Subject(model, made, self.x, self.seconds, config)

    def activations(self, layers: Sequence[Layer]) -> list[Tensor]:
        """Return the activations [K, h, w] of each layer for the image."""
        activations: list[Tensor] = nets.activations(
            self.made, self.image.tensor[None], [layer.name for layer in layers]
        )
        return activations

    def call(self, method: str, layers: tuple[str, ...] = (), **parameters: Value) -> MethodCall:
        """Return a method call on these layers, or on the default layers of the model."""
        entry = METHODS[method]
        many = entry.layers == "many"
        chosen = self.model.find_layers(layers, "") if layers else self.model.default_layers(many)
        return MethodCall(entry, entry.check(parameters, ""), chosen)


def at_equal_terms(name: str, device: torch.device) -> str:
    """Return the name of a side that has what the served model has: its allocator, or on a GPU its precision."""
    return f"{name}, camserve's {'precision' if device.type == 'cuda' else 'allocator'}"


def photograph() -> PIL.Image.Image:
    """Return the photograph of a cat from scikit-image (CC0)."""
    return PIL.Image.fromarray(skimage.data.chelsea())


def resnet50() -> nn.Module:
    """Return ResNet50 with random weights, scaled so that activations and logits resemble a trained network."""
    return calibrated("resnet50")


def vgg16() -> nn.Module:
    """Return VGG16 with random weights, scaled so that logits resemble a trained network."""
    return calibrated("vgg16")


def calibrated(name: str) -> nn.Module:
    """Return a network whose random weights are scaled on eight rotated, mirrored and shifted photographs."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = Preprocessing((224, 224), mean, std, "bilinear")(photograph())
    rotated = [x.rot90(k, (1, 2)) for k in range(4)]
    net: nn.Module = nets.calibrated(name, on=torch.stack([*rotated, *(x.flip(2).roll(16 * k, 1) for k in range(4))]))
    return net


PRECISION: Any = ("fp32", "bf16", "fp16")
CONFIGS = {  # the networks of a run without --models
    "efficientnet-lite0": embedded_model().model_copy(update={"precision": PRECISION}),
    "resnet50": ModelConfig(name="resnet50", source="python:benchmarks.subjects:resnet50", precision=PRECISION),
    "vgg16": ModelConfig(name="vgg16", source="python:benchmarks.subjects:vgg16", precision=PRECISION),
}


# A small network with which the commands can be tried on a CPU.
TINY = ModelConfig(
    name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4, precision=PRECISION
)


def served_config(name: str, precision: str = "fp32", *, compile_: bool = False) -> ModelConfig:
    """Return the configuration of a network whose first precision is `precision`.

    Args:
        name: One of `CONFIGS`, or "tiny".
        precision: Precision that the model has if a request names none.
        compile_: True to compile the forward pass.
    """
    config = TINY if name == TINY.name else CONFIGS[name]
    precisions: Any = (precision, *(each for each in PRECISION if each != precision))
    return config.model_copy(update={"precision": precisions, "compile": compile_})


def from_config(config: ModelConfig, device: torch.device, seconds: float) -> Subject:
    """Load and warm up the model of a configuration, as the server does."""
    model, made = run_on_thread(_loaded, config, device)
    run_on_thread(warm_up, model, config.batch_size)
    return Subject(model, made, model.preprocessing(photograph()), seconds, config)


def _loaded(config: ModelConfig, device: torch.device) -> tuple[Model, nn.Module]:
    """Return the served model and the original network."""
    model = load(config, device)
    return model, made(config, device, model.dtype)[0]


def made(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Image]:
    """Return the original network in contiguous format and the photograph as its input."""
    net = build_network(config, "models").eval().requires_grad_(False).to(device, dtype)
    preprocessing = Preprocessing(config.input_size, config.mean, config.std, config.interpolation)
    row = as_row(preprocessing(photograph()))
    return net, Image(*(values.to(device, dtype) for values in (row, *preprocessing.columns)))
