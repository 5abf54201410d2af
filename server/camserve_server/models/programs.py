"""Networks from files that contain their code: TorchScript archives and exported programs."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError, describe
from camserve_server.models.factories import Scripted


def check_program(path: Path, config: ModelConfig, where: str) -> None:
    """Check that the file exists and that its code may run.

    Args:
        path: TorchScript archive or exported program (.pt2).
        config: Configuration of the model.
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: The file does not exist, or `allow_code` is not set.
    """
    kind = config.source.partition(":")[0]
    if not config.allow_code:
        raise ConfigError(
            f"{where}.allow_code: a file of {kind}: contains code, which would run in the server; set "
            "allow_code = true if you trust the file"
        )
    if not path.is_file():
        raise ConfigError(f"{where}.source: there is no file {path}; expected {kind}:FILE")


def build_program(path: Path, config: ModelConfig, where: str) -> nn.Module:
    """Load a TorchScript archive or an exported program.

    Args:
        path: The file, which `check_program` has accepted.
        config: Configuration of the model.
        where: Configuration key of the model, for errors.

    Returns:
        The network, [N, C, H, W] → logits [N, classes].

    Raises:
        ConfigError: The file cannot be loaded.
    """
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401  (the code may use torchvision's operators)

    kind = config.source.partition(":")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "torchscript":
                script = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
                return Scripted(script)
            module: nn.Module = torch.export.load(str(path)).module()
            return module
    except Exception as error:
        saved = "torch.jit.save" if kind == "torchscript" else "torch.export.save"
        raise ConfigError(
            f"{where}.source: {path} cannot be loaded: {describe(error)}; expected a file of {saved}"
        ) from error
