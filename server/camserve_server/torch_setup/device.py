"""Choice of the device that models run on."""

from __future__ import annotations

import torch

from camserve_server.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the device for a name of the configuration.

    Args:
        name: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one and the CPU otherwise.

    Raises:
        ConfigError: The name requests a GPU and torch finds none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f'device: {name} was requested, but torch finds no GPU; set "cpu" or "auto"')
    return torch.device(name)
