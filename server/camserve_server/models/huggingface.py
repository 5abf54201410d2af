"""Image classifiers of Hugging Face, with the preprocessing and the labels of their own files."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Mapping
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError, describe

log = structlog.get_logger()

# Names of Pillow's filters by their number.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_NUMBERED = re.compile(r"LABEL_\d+")


def check_huggingface(where: str) -> None:
    """Raise ConfigError if the package of the extra `transformers` is not installed.

    Args:
        where: Configuration key of the model, for errors.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            f"{where}.source: networks of Hugging Face need transformers; install camserve[transformers]: "
            "pip install 'camserve[transformers]'"
        )


def build_huggingface(name: str, config: ModelConfig, where: str) -> nn.Module:
    """Build an image classifier from a directory or from the Hugging Face Hub.

    Args:
        name: Directory with `config.json`, `model.safetensors` and `preprocessor_config.json`, which is read without
            the network; or a name of the Hub, NAME or NAME@REVISION.
        config: Configuration of the model.
        where: Configuration key of the model, for errors.

    Returns:
        The network, [N, C, H, W] → an object with logits [N, classes]. Its attribute `config_defaults` contains the
        preprocessing and the head of the files, and `own_labels` the labels.

    Raises:
        ConfigError: The files cannot be read, or they contain no image classifier.
    """
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401  (transformers imports torchvision)

    transformers: Any = importlib.import_module("transformers")  # has no complete annotations
    directory = config.resolve(name)
    local = directory.is_dir()
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    path = str(directory)
    if not local:
        path, _, revision = name.partition("@")
        options["revision"] = revision or "main"
    transformers.utils.logging.disable_progress_bar()
    module, report = _load_network(transformers, path, options, name, where)
    missing = sorted({*report["missing_keys"], *(str(each[0]) for each in report["mismatched_keys"])})
    if missing:
        raise ConfigError(
            f"{where}.source: {name} has no weights for {', '.join(missing[:10])}; expected the weights of an image "
            "classifier; fine-tune the network and save it with save_pretrained"
        )
    settings: Any = module.config
    if settings.problem_type == "regression":
        raise ConfigError(f"{where}.source: {name} is a regression; expected an image classifier")
    defaults: dict[str, Any] = {}
    if settings.problem_type == "multi_label_classification":
        defaults["head"] = "sigmoid"
    configured = {"input_size", "mean", "std", "interpolation"} <= config.model_fields_set
    processor: Mapping[str, Any] = {}
    try:
        processor = _load_processor(transformers, path, options, name, where)
    except ConfigError:
        if not configured:
            raise
    if not configured:
        defaults |= preprocessing(processor, where)
        if _crops(processor):
            log.warning("the image processor crops, but camserve resizes the whole image", model=config.name)
    if processor.get("do_flip_channel_order"):
        module.register_forward_pre_hook(_FlipChannels())
        for key in {"mean", "std"} & defaults.keys():  # configured values have the order of the image
            defaults[key] = defaults[key][::-1]
    module.config_defaults, module.own_labels = defaults, _labels(settings.id2label)
    network: nn.Module = module
    return network


def _load_network(
    transformers: Any, path: str, options: dict[str, Any], name: str, where: str
) -> tuple[Any, dict[str, Any]]:
    """Return the network, and which of its weights the files lack."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module, report = transformers.AutoModelForImageClassification.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
            )
    except Exception as error:
        pickles = isinstance(error, OSError) and "safetensors" in str(error)
        hint = "; expected model.safetensors, because pickles are not read: save it with save_pretrained"
        raise ConfigError(
            f"{where}.source: {name} cannot be loaded as an image classifier of Hugging Face: "
            f"{describe(error)}{hint if pickles else ''}"
        ) from error
    return module, report


def _load_processor(transformers: Any, path: str, options: dict[str, Any], name: str, where: str) -> Mapping[str, Any]:
    try:
        processor: Mapping[str, Any] = transformers.AutoImageProcessor.from_pretrained(path, **options).to_dict()
    except Exception as error:
        raise ConfigError(
            f"{where}.source: {name} has no image processor: {describe(error)}; add "
            "preprocessor_config.json, or set input_size, mean, std and interpolation"
        ) from error
    return processor


# ---- preprocessing ---------------------------------------------------------------------------------------------------


def preprocessing(processor: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the configuration keys that have the effect of an image processor on pixels in [0, 1].

    Args:
        processor: Settings of the image processor.
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: The processor has no input size.
    """
    size = processor.get("crop_size") if processor.get("do_center_crop") else None
    size = size or processor.get("size") or {}
    height, width = (
        (size, size)
        if isinstance(size, int)
        else (size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge")))
    )
    if not height or not width:
        raise ConfigError(f"{where}.input_size: the image processor has no size; set the key to [height, width]")
    # The processor computes (255 · pixel · factor − offset − mean) / std. A key that is missing means no.
    scale = 255 * (processor.get("rescale_factor") or 1 / 255) if processor.get("do_rescale") else 255.0
    offset = 1.0 if processor.get("rescale_offset") else 0.0
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3
    if processor.get("do_normalize"):
        mean, std = tuple(processor["image_mean"]), tuple(processor["image_std"])
        if processor.get("include_top"):  # EfficientNet divides by the standard deviation twice
            std = tuple(each**2 for each in std)
    return {
        "input_size": (int(height), int(width)),
        "mean": tuple((offset + each) / scale for each in mean),
        "std": tuple(each / scale for each in std),
        "interpolation": _FILTERS.get(int(processor.get("resample") or 0), "bilinear"),
    }


def _crops(processor: Mapping[str, Any]) -> bool:
    size = processor.get("size")
    keeps_proportions = isinstance(size, Mapping) and "shortest_edge" in size
    return bool(processor.get("do_center_crop")) or keeps_proportions


def _labels(names: Mapping[int, str] | None) -> tuple[str, ...]:
    """Return the labels in the order of the classes; empty if they are only numbers."""
    labels = tuple(str(names[i]) for i in sorted(names)) if names else ()
    return () if all(_NUMBERED.fullmatch(label) for label in labels) else labels


class _FlipChannels:
    """Forward pre-hook of networks that expect blue, green, red."""

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the image with its channels in reverse order."""
        return (args[0].flip(1), *args[1:])
