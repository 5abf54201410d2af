"""The networks of the sweep. All have random weights, so nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from benchmarks.sweep import monai_networks
from camserve_server.config import ModelConfig

# Parts of names of small networks, the smallest first.
_SMALL = (
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs",
    "xx_small",
    "tiny",
    "mini",
    "x_small",
    "_xs",
    "small",
    "18",
    "26",
    "50",
)
_CLASSES = 10


def all_networks() -> list[str]:
    """Return the names "LIBRARY:NETWORK" of all networks whose library is installed, by library."""
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401

    import torchvision  # isort: skip
    import timm

    names = [f"torchvision:{name}" for name in torchvision.models.list_models(torchvision.models)]
    names += [f"timm:{_of_module(timm, module)}" for module in timm.list_modules()]
    if importlib.util.find_spec("transformers"):
        auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
        names += [f"huggingface:{name}" for name in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES]
    if importlib.util.find_spec("monai"):
        names += [f"monai:{name}" for name in monai_networks.NAMES]
    return names


@contextmanager
def config_of(name: str) -> Iterator[ModelConfig]:
    """Yield the configuration of a network. Its files exist in the context only.

    Args:
        name: "LIBRARY:NETWORK".
    """
    library, _, network = name.partition(":")
    match library:
        case "huggingface":
            with TemporaryDirectory() as folder:
                yield _huggingface(network, Path(folder))
        case "monai":
            yield ModelConfig(
                name="network", source=f"python:benchmarks.sweep.monai_networks:{network}", mean=(0.5,), std=(0.5,)
            )
        case "torchvision" | "timm":
            yield ModelConfig(name="network", source=name, allow_random_weights=True)
        case _:
            yield ModelConfig(name="network", source=name)


def _of_module(timm: Any, module: str) -> str:
    """Return a small network with a classifier of one of timm's modules."""

    def order(name: str) -> tuple[bool, int, int, str]:
        settings = timm.models.get_pretrained_cfg(name)
        without_classifier = settings is None or settings.num_classes < 1000
        pixels = settings.input_size[1] if settings else 224
        size = next((i for i, part in enumerate(_SMALL) if part in name), len(_SMALL))
        return without_classifier, max(pixels, 256), size, name

    return str(min(timm.list_models(module=module), key=order))


def _huggingface(kind: str, folder: Path) -> ModelConfig:
    """Write an image classifier with the default settings of its kind, and return its configuration."""
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401

    transformers: Any = importlib.import_module("transformers")
    settings = transformers.AutoConfig.for_model(kind, num_labels=_CLASSES)
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    classes = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[kind]
    size = getattr(settings, "image_size", None)
    height, width = size if isinstance(size, list | tuple) else (size or 224,) * 2
    torch.manual_seed(0)
    network = getattr(transformers, classes if isinstance(classes, str) else classes[0])(settings)
    _set_statistics(network, height, width)
    network.save_pretrained(folder)
    return ModelConfig(
        name="network",
        source=f"huggingface:{folder}",
        input_size=(height, width),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        interpolation="bilinear",
    )


def _set_statistics(network: nn.Module, height: int, width: int) -> None:
    """Set the statistics of batch norms to those of random images.

    With the initial statistics, the outputs of some networks with random weights are denormal numbers or zero.
    """
    norms = [each for each in network.modules() if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None  # the average of all batches, of which there is one
    with torch.no_grad():
        network(torch.randn(2, 3, height, width))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
