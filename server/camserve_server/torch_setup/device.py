"""Choice of the device that models run on."""

from __future__ import annotations

import torch

from camserve_server.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the device for a name of the configuration, and make its arithmetic reproducible.

    On a GPU, this switches off TF32 and selects deterministic convolutions.

    Args:
        name: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one and the CPU otherwise.

    Raises:
        ConfigError: The name requests a GPU and torch finds none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError(f'device: {name} was requested, but torch finds no GPU; set "cpu" or "auto"')
        # By default, convolutions compute in TF32 and may use different kernels in different runs.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    return torch.device(name)
