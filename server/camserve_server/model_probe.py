"""Report of what a server would serve for a model source, for `camserve models probe`."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from camserve_server import registry
from camserve_server.config import Config, ModelConfig, read_config
from camserve_server.engine.lanes.hooks import hooks
from camserve_server.engine.warmup import warm_up
from camserve_server.errors import CamserveError, ConfigError, describe
from camserve_server.models.checks import adapt
from camserve_server.models.cuts import MAX_CUT, layers_with_cuts
from camserve_server.models.layers import Layer
from camserve_server.models.load import load, state_digest
from camserve_server.models.model import Model
from camserve_server.models.pixels import decode
from camserve_server.models.servable import unsupported_reason
from camserve_server.models.sources import build_network
from camserve_server.service.logs import log_to_stderr
from camserve_server.torch_setup.device import pick_device

_NAME = "probe"
STEPS = 5  # of `probe_source`


@dataclass(frozen=True, eq=False)
class ProbedLayer:
    """A layer of a model.

    Attributes:
        layer: The layer with its cut value.
        default_of: Kinds of methods that use it by default: "one" for those of one layer, "several" for the others.
        map: Mean absolute activation over the channels for the image, float32 [h, w], scaled to [0, 1]. None for layers
            that are neither cuts nor defaults, and for layers with the same output as another layer with a map.
    """

    layer: Layer
    default_of: tuple[str, ...]
    map: NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class ModelReport:
    """Description of the model that a server would serve for a source.

    Attributes:
        facts: Properties of the model by name, as texts.
        image: The image at the input size of the model, uint8 [H, W, 1 or 3].
        layers: All layers that can be named, in the order of the forward pass.
        methods: All methods, with the reason why the model cannot serve it; empty if it can.
        warnings: Sentences about what affects the maps of the model.
    """

    facts: Mapping[str, str]
    image: NDArray[np.uint8]
    layers: tuple[ProbedLayer, ...]
    methods: Mapping[str, str]
    warnings: tuple[str, ...]


def probe_source(
    source: str, keys: Mapping[str, Any], image: Path | None, on_step: Callable[[str], object] = lambda _: None
) -> ModelReport:
    """Load the model of a source, as a server does, and report what would be served.

    Args:
        source: Source of the model, such as "torchvision:resnet50".
        keys: Further keys of the model in the configuration.
        image: Image file for the maps of the layers; None for a generated one.
        on_step: Receives the name of each of the STEPS steps when it begins.

    Raises:
        ValueError: The model is refused, its code fails, or the image cannot be read. Each line of the message begins
            with the key.
    """
    table = {**keys, "name": _NAME, "source": source}
    try:
        settings = read_config(models=[table], log_level="error")  # the report contains the warnings
        log_to_stderr(settings)
        photograph = example_image() if image is None else _read_image(image, settings)
        [config] = settings.models
        on_step("load")
        model = load(config.model_copy(update={"compile": False}), pick_device(settings.device))
        on_step("warm-up")
        warm_up(model, batch_size=1)
        return _report(model, config, photograph, on_step)
    except (ConfigError, CamserveError) as error:
        lines = str(error).splitlines()
        raise ValueError(
            "\n".join(line.removeprefix(f"models.{_NAME}.").removeprefix("models.0.") for line in lines)
        ) from error
    except Exception as error:  # the code of a network can raise any exception
        raise ValueError(
            f"source: the network failed while it was examined: {describe(error)}; correct its code"
        ) from error


def example_image() -> PIL.Image.Image:
    """Return a generated image, RGB, 256 × 256: a disc and a striped square before a gradient with noise."""
    y, x = np.mgrid[:256, :256] / 255
    noise = np.random.default_rng(0).normal(0, 0.03, (256, 256, 1))
    pixels = np.stack([0.3 + 0.4 * y, 0.5 + 0.2 * x, 0.8 - 0.4 * y], axis=-1) + noise
    pixels[(x - 0.3) ** 2 + (y - 0.35) ** 2 < 0.04] = (0.9, 0.4, 0.1)
    square = (abs(x - 0.7) < 0.17) & (abs(y - 0.68) < 0.17)
    pixels[square] = np.where((x * 32 % 2 < 1)[..., None], (0.1, 0.15, 0.3), (0.95, 0.95, 0.8))[square]
    return PIL.Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))


def input_of(model: Model, image: PIL.Image.Image) -> Tensor:
    """Return the input [1, C, H, W] of a model for an image, on its device; noise for a model of tensors."""
    wanted = model.preprocessing
    if wanted.channels in (1, 3):
        x = wanted(image)
    else:
        x = torch.randn(wanted.channels, *wanted.size, generator=torch.Generator().manual_seed(0))
    return x[None].to(model.device, model.dtype)


def original_network(config: ModelConfig, model: Model) -> nn.Module | None:
    """Build the network of a loaded model again, without the server's changes, except that it returns one tensor.

    Args:
        config: Configuration of the model.
        model: The loaded model.

    Returns:
        The network, [1, C, H, W] → outputs [1, classes], or [1, 1] for two classes; None if its weights differ from
        those of the model, because a factory draws them at random.
    """
    module = build_network(config, f"models.{config.name}")
    with contextlib.suppress(NotImplementedError):  # an exported program has no modes
        module.eval()
    if state_digest(module) != model.digest:
        return None
    adapt(module)
    return module.to(model.device, model.dtype)


def difference_to_original(model: Model, original: nn.Module, x: Tensor) -> tuple[str, float]:
    """Compare the outputs of a model with those of the original network.

    Args:
        model: The loaded model.
        original: Its network (`original_network`).
        x: Input [1, C, H, W].

    Returns:
        What the original network returns, "logits" or "probabilities", and the largest difference as a share of the
        largest absolute output.
    """
    with torch.no_grad():
        expected = original(x).double()
        batch = x.to(model.compute_dtype).contiguous(memory_format=model.memory_format)
        logits = model.module(batch).double()
    # A network of one logit is served with two classes.
    served = {"logits": logits, "probabilities": model.probabilities(logits)}
    shares = {
        kind: float((y[:, : expected.shape[1]] - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
        for kind, y in served.items()
    }
    kind = min(shares, key=shares.__getitem__)
    return kind, shares[kind]


def _read_image(path: Path, settings: Config) -> PIL.Image.Image:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"image: {path}: {error.strerror}; give an image file") from error
    return decode(data, max_pixels=settings.max_image_pixels, field="image")


def _report(model: Model, config: ModelConfig, image: PIL.Image.Image, on_step: Callable[[str], object]) -> ModelReport:
    registry.discover()
    x = input_of(model, image)
    on_step("original network")
    _, channels, height, width = x.shape
    original = original_network(config, model)
    if original is None:
        agreement = "unknown, because the factory returns other weights at each call"
    else:
        kind, share = difference_to_original(model, original, x)
        agreement = f"{share:.1e} of the largest one of the original network ({kind})"
    facts = {
        "source": model.source + (", random weights" if model.random_weights else ""),
        "digest": model.digest,
        "input": f"{channels} × {height} × {width}",
        "classes": f"{model.classes:,}, {model.head}",
        "precision": f"{', '.join(model.precisions)} on {model.device}",
        "largest difference of outputs": agreement,
        **{f"no {kind} passes": reason for kind, reason in sorted(model.unavailable.items())},
    }
    pixels = model.preprocessing.resized(image)
    methods = {name: unsupported_reason(registry.METHODS[name], model) for name in sorted(registry.METHODS)}
    on_step("cut values")
    layers = [*layers_with_cuts(model)]
    on_step("maps")
    return ModelReport(facts, pixels, _probed_layers(model, layers, x), methods, model.warnings)


def _probed_layers(model: Model, layers: Sequence[Layer], x: Tensor) -> tuple[ProbedLayer, ...]:
    several = {each.name for each in model.layers}
    one = model.layer.name if model.layer else ""
    default_of = {
        each.name: (*(["one"] if each.name == one else []), *(["several"] if each.name in several else []))
        for each in layers
    }
    shown = [each for each in layers if default_of[each.name] or (each.cut is not None and each.cut <= MAX_CUT)]
    shown.sort(key=lambda each: not default_of[each.name])  # of equal outputs, the map of a default layer is kept
    maps = _maps(model, x, shown)
    return tuple(ProbedLayer(each, default_of[each.name], maps.get(each.name)) for each in layers)


def _maps(model: Model, x: Tensor, layers: Sequence[Layer]) -> dict[str, NDArray[np.float32]]:
    """Return the map of each distinct output for the input [1, C, H, W], under the first layer that has it."""
    maps: dict[str, NDArray[np.float32]] = {}
    digests: dict[str, bytes] = {}

    def keep(name: str, output: Tensor) -> None:
        values = model.spatial[name].grid(output)[0].float()
        digests[name] = hashlib.sha256(values.cpu().numpy().tobytes()).digest()
        strength = values.abs().mean(dim=0)
        strength = strength - strength.min()
        maps[name] = (strength / strength.max().clamp(min=1e-12)).cpu().numpy()

    batch = x.to(model.compute_dtype).contiguous(memory_format=model.memory_format)
    with torch.no_grad(), hooks(model, [each.name for each in layers], keep):
        model.module(batch)
    first = {digests[each.name]: each.name for each in reversed(layers)}
    return {name: maps[name] for name in first.values()}
