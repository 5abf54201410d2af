"""The device that models run on."""

from __future__ import annotations

import torch

from camserve_server.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device of that name; for "auto" a GPU if there is any. Raises ConfigError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError(f"device: {name} was asked for, but torch sees no GPU")
        # Convolutions compute in TF32 by default, and may take another kernel from run to run.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    return torch.device(name)
