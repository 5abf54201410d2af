"""From a model's configuration to a model: network, digest, layers, labels."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError
from camserve_server.models.fold import fold_batch_norm, fold_padding
from camserve_server.models.layers import Layer, find_layer
from camserve_server.models.model import Head, Model, Precision, no_layer
from camserve_server.models.pixels import Preprocessing
from camserve_server.models.probe import Probed, probe
from camserve_server.models.sources import build_network, input_channels, with_network_defaults

# Of what plans compute with.
_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.float32,
    "fp64": torch.float64,
}


def load(config: ModelConfig, device: torch.device) -> Model:
    """The model that `config` describes, on `device`, frozen. Raises ConfigError, naming the model and the key."""
    where = f"models.{config.name}"
    module = build_network(config, where).eval().requires_grad_(False)
    config = with_network_defaults(config, module)
    if len(config.mean) != len(config.std):
        raise ConfigError(f"{where}.std: {len(config.std)} numbers where mean has {len(config.mean)}; set both")
    digest = state_digest(module)
    precision, *others = dict.fromkeys(config.precision)
    if "tf32" in config.precision and device.type != "cuda":
        raise ConfigError(f"{where}.precision: only GPUs compute in tf32")
    dtype = _DTYPES[precision]
    # The network is looked at in full precision, whatever it computes with.
    module.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    example = _example(config, device, dtype)
    found = _probed(module, example, config, where)
    layers, layer = _several(config, found, where), _single(config, found, where)
    if device.type == "cpu":  # where it has been measured
        fold_padding(module, example)
    folded: dict[str, str] = {}
    if config.fold_batch_norm:
        wanted = [*layers, layer, found.gap and found.gap.layer]
        folded = fold_batch_norm(module, example, keep={each.module for each in wanted if each})
    model = Model(
        name=config.name,
        source=config.source,
        digest=digest,
        module=module,
        device=device,
        dtype=dtype,
        preprocessing=Preprocessing(config.input_size, config.mean, config.std, config.interpolation),
        labels=_labels(config, found.classes, where),
        classes=found.classes,
        spatial={name: each for name, each in found.spatial.items() if each.module not in folded},
        layers=layers,
        layer=layer,
        head=_head(config, found.classes, where),
        gap=found.gap,
        attention=found.attention,
        attention_prefix=found.attention_prefix,
        attention_grid=found.attention_grid,
        folded=folded,
        random_weights=config.allow_random_weights and config.weights is None,
        compile=config.compile,
    )
    made: dict[Precision, Model] = {each: _at(model, each) for each in (precision, *others)}
    main = made.pop(precision)
    main.others = made
    return main


def _at(model: Model, precision: Precision) -> Model:
    """The model at that precision, as a copy of the network unless it is as it should be."""
    changes: dict[str, Any] = {"precision": precision, "dtype": _DTYPES[precision], "batch_sizes": {}, "rows_per_s": {}}
    at = replace(model, **changes)
    if at.compute_dtype == model.dtype:
        return at
    return model.with_module(copy.deepcopy(model.module).to(at.compute_dtype), **changes)


def state_digest(module: nn.Module) -> str:
    """ "sha256:…" over names, types, shapes and values of the state, the same for every file format."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        values = value.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _example(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    shape = [1, len(config.mean), *config.input_size]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _probed(module: nn.Module, example: Tensor, config: ModelConfig, where: str) -> Probed:
    try:
        found = probe(module, example, config.token_grid)
    except Exception as error:  # a network may fail in any way
        taken = input_channels(module)
        if taken in (1, 3) and taken != len(config.mean):
            raise ConfigError(
                f"{where}.mean: the network's input has {'one channel' if taken == 1 else '3 channels'}; "
                f"give mean and std as many numbers, not {len(config.mean)}"
            ) from error
        raise ConfigError(
            f"{where}.input_size: the network does not run on an input of {[*example.shape]}: {error}"
        ) from error
    if config.token_grid is not None and all(layer.form != "tokens" for layer in found.spatial.values()):
        raise ConfigError(f"{where}.token_grid: the network has no output [1, tokens, K] with a grid of that size")
    return found


def _several(config: ModelConfig, found: Probed, where: str) -> tuple[Layer, ...]:
    if config.layers is None:
        return found.layers
    layers = tuple(_named(name, found, f"{where}.layers") for name in config.layers)
    sizes = [layer.positions for layer in layers]
    if sizes != sorted(sizes, reverse=True):
        raise ConfigError(f"{where}.layers: they must go from fine to coarse, but have {sizes} positions")
    return layers


def _single(config: ModelConfig, found: Probed, where: str) -> Layer | None:
    if config.layer is not None:
        return _named(config.layer, found, f"{where}.layer")
    return found.layer if config.layers is None else _named(config.layers[-1], found, f"{where}.layers")


def _named(name: str, found: Probed, key: str) -> Layer:
    layer = find_layer(name, found.spatial)
    if layer is None:
        raise ConfigError(f"{key}: there is {no_layer(name, found.spatial)}")
    return layer


def _head(config: ModelConfig, classes: int, where: str) -> Head:
    if config.head == "softmax" and classes == 1:
        raise ConfigError(f"{where}.head: the softmax of a single logit is always 1; leave it out")
    return config.head or ("sigmoid" if classes == 1 else "softmax")


def _labels(config: ModelConfig, classes: int, where: str) -> tuple[str, ...]:
    if config.labels is None:
        return ()
    if config.labels == "imagenet":
        from camserve_server.torch_setup import torchvision_ops  # noqa: F401

        import torchvision  # isort: skip

        labels = list(torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    else:
        labels = read_labels(config.resolve(config.labels), where)
    if len(labels) != classes:
        raise ConfigError(f"{where}.labels: {len(labels)} labels for {classes} classes")
    return tuple(labels)


def read_labels(path: Path, where: str) -> list[str]:
    """One label a line. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}.labels: {error}") from error
