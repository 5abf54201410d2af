"""Loading of models: network, digest, layers and labels from a configuration."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError, describe
from camserve_server.models.checks import adapt, prepare, require_hooks, set_memory_format
from camserve_server.models.cuts import MAX_CUT, measure_cuts
from camserve_server.models.factories import code_digest
from camserve_server.models.fold import fold_batch_norm, fold_padding
from camserve_server.models.heads import Head
from camserve_server.models.layers import Layer, find_layer, module_aliases
from camserve_server.models.model import Model, Precision, describe_missing_layer
from camserve_server.models.outputs import two_classes
from camserve_server.models.pixels import Preprocessing
from camserve_server.models.probe import ProbeResult, probe
from camserve_server.models.remote import NO_ACTIVATIONS, NO_GRADIENTS, warnings_about
from camserve_server.models.sources import build_network, with_channels_of_first_convolution, with_network_defaults
from camserve_server.models.throughput import Throughput
from camserve_server.torch_setup.arithmetic import full_precision
from camserve_server.torch_setup.compiler import compile_obstacle, use_compile

log = structlog.get_logger()

# Data type that plans compute with, for each precision of the network.
_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.float32,
    "fp16": torch.float32,
    "fp64": torch.float64,
}


# Largest difference between logits in fp16 and fp32, as a share of the largest logit.
FP16_TOLERANCE = 0.03


@full_precision()
def load(config: ModelConfig, device: torch.device) -> Model:
    """Load the model that a configuration describes.

    Args:
        config: Configuration of the model.
        device: Device of the model. That of a remote model is always the CPU.

    Returns:
        The model at its first precision, frozen and in evaluation mode; `Model.others` holds the other precisions.

    Raises:
        ConfigError: The model cannot be loaded. The message names the model and the configuration key.
        torch.OutOfMemoryError: The model does not fit into the memory of the device.
    """
    where = f"models.{config.name}"
    _check_openvino(config, where)
    module = build_network(config, where)
    _freeze(module, where)
    config = with_network_defaults(config, module)
    if len(config.mean) != len(config.std):
        raise ConfigError(
            f"{where}.std: std has {len(config.std)} numbers and mean has {len(config.mean)}; "
            "give both the same number of values"
        )
    digest = state_digest(module)
    precision, *others = dict.fromkeys(config.precision or [_default_precision(module, device)])
    if "tf32" in (precision, *others) and device.type != "cuda":
        raise ConfigError(f"{where}.precision: only GPUs compute in tf32; choose fp32, bf16, fp16 or fp64")
    dtype = _DTYPES[precision]
    # The layers are detected in full precision, even if the network is served at a lower one.
    device = torch.device("cpu") if config.remote else device
    module.to(device, dtype)
    example = _example(config, device, dtype)
    adapt(module)
    try:
        prepared = prepare(module, example, config, where)
    except ConfigError:
        config = with_channels_of_first_convolution(config, module)
        if len(config.mean) == example.shape[1]:
            raise
        example = _example(config, device, dtype)
        prepared = prepare(module, example, config, where)
    structure = _probe(module, example, config, where)
    aliases = module_aliases(module)
    layers = _default_layers(config, structure, aliases, where)
    layer = _default_layer(config, structure, aliases, where)
    layers, layer, warnings = _with_cut_values(module, example, structure, layers, layer)
    if device.type == "cpu":  # the gain has been measured on CPUs only
        fold_padding(module, example)
    folded: dict[str, str] = {}
    if config.fold_batch_norm:
        needed = [*layers, layer, structure.gap and structure.gap.layer]
        folded = fold_batch_norm(module, example, keep={each.module for each in needed if each})
    if not prepared.channels_last:
        set_memory_format(module, channels_last=False)  # padded convolutions are channels-last
    measured = {each.name: each for each in (*layers, layer) if each}
    spatial = {name: measured.get(name, each) for name, each in structure.spatial.items() if each.module not in folded}
    require_hooks(module, example, [*spatial.values()], where)
    classes, head = _classes_and_head(module, structure.classes, prepared.head, config, where)
    model = Model(
        name=config.name,
        source=config.source,
        digest=digest,
        code=code_digest(config),
        module=module,
        device=device,
        dtype=dtype,
        preprocessing=Preprocessing(config.input_size, config.mean, config.std, config.interpolation),
        labels=_labels(config, structure.classes, getattr(module, "own_labels", ()), where),
        classes=classes,
        spatial=spatial,
        layers=layers,
        layer=layer,
        head=head,
        binary=structure.classes == 1,
        channels_last=prepared.channels_last,
        one_row=prepared.one_row,
        warnings=(*getattr(module, "own_warnings", ()), *prepared.warnings, *warnings),
        gap=structure.gap,
        attention=structure.attention,
        attention_prefix=structure.attention_prefix,
        attention_grid=structure.attention_grid,
        folded=folded,
        aliases=aliases,
        random_weights=config.allow_random_weights and config.weights is None,
        no_layer=structure.no_layer,
        compile=_compiles(config, device),
        openvino=config.openvino,
    )
    _limit_remote(model, config)
    for sentence in model.warnings:
        log.warning("a model is served with a limitation", model=model.name, reason=sentence)
    made: dict[Precision, Model] = {each: _at_precision(model, each) for each in (precision, *others)}
    if "fp16" in made:
        _require_fp16(made["fp16"], model, example, where)
    main = made.pop(precision)
    main.others = made
    return main


def _compiles(config: ModelConfig, device: torch.device) -> bool:
    used, obstacle = use_compile(config.compile, device.type, compile_obstacle)
    if obstacle:
        log.info("torch.compile is not used", model=config.name, reason=obstacle)
    return used


def _check_openvino(config: ModelConfig, where: str) -> None:
    if config.openvino and find_spec("openvino") is None:
        raise ConfigError(
            f"{where}.openvino: OpenVINO is not installed; run pip install 'camserve[openvino]', or remove the key"
        )


def _default_precision(module: nn.Module, device: torch.device) -> Precision:
    """Return the precision of a model whose configuration names none: on GPUs that of torch, which is tf32."""
    # ONNX Runtime and remote servers choose their own arithmetic; such networks have no weights.
    has_weights = next(module.parameters(), None) is not None
    return "tf32" if device.type == "cuda" and has_weights else "fp32"


@torch.no_grad()
def _require_fp16(half: Model, full: Model, example: Tensor, where: str) -> None:
    """Raise ConfigError if the logits in fp16, whose largest value is 65504, are not finite or differ too much."""
    try:
        logits = half.module(example.to(half.compute_dtype)).to(full.dtype)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ConfigError(
            f"{where}.precision: the network does not run in fp16: {describe(error)}; choose bf16"
        ) from error
    expected = full.module(example)
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference <= FP16_TOLERANCE:  # also if it is not a number
        problem = "are not finite" if not logits.isfinite().all() else f"differ by {difference:.0%} of the largest one"
        raise ConfigError(f"{where}.precision: in fp16, the logits {problem}; choose bf16, which has the range of fp32")


def _freeze(module: nn.Module, where: str) -> None:
    """Set the evaluation mode, and let no weight need a gradient, in place."""
    for name, weight in module.named_parameters():
        if isinstance(weight, UninitializedParameter):
            raise ConfigError(
                f"{where}.source: the weight {name} of a lazy module has no values; set weights, or call the network "
                "once in the factory"
            )
    with contextlib.suppress(NotImplementedError):  # an exported program has no modes
        module.eval()
    for weight in module.parameters():  # TorchScript has no module.requires_grad_
        weight.requires_grad_(False)


def _limit_remote(model: Model, config: ModelConfig) -> None:
    """Set the attributes of a model that differ if another server runs the network."""
    if model.remote is not None:
        model.unavailable |= {"gradient": NO_GRADIENTS, "ascend": NO_GRADIENTS}
        model.no_layer = NO_ACTIVATIONS
        model.warnings += warnings_about(model.remote, model.spatial, config)


def _at_precision(model: Model, precision: Precision) -> Model:
    """Return the model at a precision; the network is copied only if its weights must be converted."""
    changes: dict[str, Any] = {"precision": precision, "dtype": _DTYPES[precision], "batch_sizes": {}}
    changes["equal_sizes"] = {}
    changes["throughput"] = defaultdict(Throughput)
    converted = replace(model, **changes)
    if converted.compute_dtype == model.dtype:
        return converted
    return model.with_module(copy.deepcopy(model.module).to(converted.compute_dtype), **changes)


def state_digest(module: nn.Module) -> str:
    """Return "sha256:…" over names, types, shapes and values of the network's state.

    The digest does not depend on the file format of the weights.

    Args:
        module: Network.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        for part in _digest_parts(name, value):
            digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def _digest_parts(name: str, value: object) -> Iterator[bytes]:
    """Yield the bytes that represent one entry of a state: a tensor, or other state as of quantised modules."""
    match value:
        case Tensor():
            values = value.detach().cpu().contiguous()
            yield f"{name} {values.dtype} {tuple(values.shape)}\n".encode()
            if values.is_quantized:
                yield str(values.dequantize().tolist()).encode()
            else:
                yield values.reshape(-1).view(torch.uint8).numpy().tobytes()
        case Mapping():
            for key, each in value.items():
                yield from _digest_parts(f"{name}.{key}", each)
        case list() | tuple():
            for i, each in enumerate(value):
                yield from _digest_parts(f"{name}.{i}", each)
        case None | bool() | int() | float() | str() | bytes() | torch.dtype():
            yield f"{name} {value!r}\n".encode()
        case _:  # the text of other objects may contain an address
            yield f"{name} {type(value).__qualname__}\n".encode()


def _example(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    shape = [1, len(config.mean), *config.input_size]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _probe(module: nn.Module, example: Tensor, config: ModelConfig, where: str) -> ProbeResult:
    try:
        structure = probe(module, example, config.token_grid)
    except torch.OutOfMemoryError:  # the network is not the reason
        raise
    except Exception as error:  # the code of a network can raise any exception
        raise ConfigError(
            f"{where}.source: the layers of the network cannot be detected: {describe(error)}; return a network "
            "from the factory that runs with hooks on its modules"
        ) from error
    if config.token_grid is not None and all(layer.form != "tokens" for layer in structure.spatial.values()):
        raise ConfigError(
            f"{where}.token_grid: the network has no output [1, tokens, K] with a grid of {list(config.token_grid)} "
            "tokens; correct the value or leave it out"
        )
    return structure


def _default_layers(
    config: ModelConfig, structure: ProbeResult, aliases: Mapping[str, str], where: str
) -> tuple[Layer, ...]:
    if config.layers is None:
        return structure.layers
    layers = tuple(_named_layer(name, structure, aliases, f"{where}.layers") for name in config.layers)
    sizes = [layer.positions for layer in layers]
    if sizes != sorted(sizes, reverse=True):
        raise ConfigError(
            f"{where}.layers: the layers have {sizes} positions; expected an order from fine to coarse; "
            "sort them by descending number of positions"
        )
    return layers


def _default_layer(config: ModelConfig, structure: ProbeResult, aliases: Mapping[str, str], where: str) -> Layer | None:
    if config.layer is not None:
        return _named_layer(config.layer, structure, aliases, f"{where}.layer")
    if config.layers is None:
        return structure.layer
    return _named_layer(config.layers[-1], structure, aliases, f"{where}.layers")


def _with_cut_values(
    module: nn.Module, example: Tensor, structure: ProbeResult, layers: tuple[Layer, ...], layer: Layer | None
) -> tuple[tuple[Layer, ...], Layer | None, tuple[str, ...]]:
    """Measure the cut values of configured layers.

    Returns:
        The layers with their cut values, and warnings about those that are not cuts.
    """
    chosen = dict.fromkeys(each for each in (*layers, layer) if each and each not in structure.defaults)
    if not chosen:
        return layers, layer, structure.warnings
    measured = dict(zip(chosen, measure_cuts(module, example, chosen), strict=True))
    warnings = [
        f"only a part of the information in the logits passes through the configured layer {each.name} (cut value "
        f"{each.cut:.2f}); name another layer or let the server choose"
        for each in measured.values()
        if each.cut is not None and each.cut > MAX_CUT
    ]
    return (
        tuple(measured.get(each, each) for each in layers),
        layer and measured.get(layer, layer),
        (*(structure.warnings if layer in structure.defaults else ()), *warnings),
    )


def _named_layer(name: str, structure: ProbeResult, aliases: Mapping[str, str], key: str) -> Layer:
    layer = find_layer(name, structure.spatial, aliases)
    if layer is None:
        raise ConfigError(f"{key}: there is {describe_missing_layer(name, structure.spatial)}")
    return layer


def _classes_and_head(module: nn.Module, outputs: int, head: Head, config: ModelConfig, where: str) -> tuple[int, Head]:
    """Return the number of classes and the head, and let a network with one output return two classes, in place."""
    if outputs > 1:
        return outputs, head
    if head == "softmax":
        raise ConfigError(
            f'{where}.head: the softmax of a single logit is always 1; set "sigmoid" or leave the key out'
        )
    two_classes(module, probabilities=head == "probabilities")
    return 2, head


def _labels(config: ModelConfig, outputs: int, own: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the label of each class; a network with one output has the positive class and then the negative one.

    The labels of the network's files are used if the configuration has none.
    """
    if config.labels is None and not own:
        return ("positive", "negative") if outputs == 1 else ()
    if config.labels is None:
        labels = [*own]
    elif config.labels == "imagenet":
        from camserve_server.torch_setup import torchvision_ops  # noqa: F401

        import torchvision  # isort: skip

        labels = list(torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    else:
        labels = read_labels(config.resolve(config.labels), where)
    if outputs == 1 and len(labels) == 1:
        labels.append(f"not {labels[0]}")
    classes = max(outputs, 2)
    if len(labels) != classes:
        raise ConfigError(
            f"{where}.labels: {len(labels)} labels for {classes} classes; give one label for each class"
            + (", first that of the positive class" if outputs == 1 else "")
        )
    return tuple(labels)


def read_labels(path: Path, where: str) -> list[str]:
    """Read a file with one label on each line.

    Args:
        path: UTF-8 text file.
        where: Configuration key of the model, for the error.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        # Editors on Windows write a byte-order mark, and many files end with empty lines.
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}.labels: {error}; expected a UTF-8 text file with one label on each line") from error
