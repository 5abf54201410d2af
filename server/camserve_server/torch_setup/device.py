"""Choice of the devices that models run on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from camserve_server.errors import ConfigError

CPU = torch.device("cpu")


def pick_device(value: str) -> torch.device:
    """Return the first of the devices that `pick_devices` returns."""
    return next(iter(pick_devices(value).values()))


def pick_devices(value: str) -> dict[str, torch.device]:
    """Return the devices for a value of the configuration key `device`.

    Args:
        value: "cpu", "cuda", "cuda:N", "cuda:N,M", "all" for all GPUs, "auto" for a GPU if there is one and the CPU
            otherwise, or "cpu:N,M" for several engines on the CPU. torch has one CPU device, so these numbers only
            give the engines different names.

    Returns:
        The devices by their names in logs, metrics and Health, in the order of the value.

    Raises:
        ConfigError: The value requests a GPU that torch does not find, or GPUs of several kinds.
    """
    if value == "auto":
        value = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, numbers = value.partition(":")
    if kind == "cpu":
        return {f"cpu:{int(each)}": CPU for each in numbers.split(",")} if numbers else {"cpu": CPU}
    if not torch.cuda.is_available():
        raise ConfigError(f'device: {value} was requested, but torch finds no GPU; set "cpu" or "auto"')
    if kind == "all":
        return _gpus(range(torch.cuda.device_count()))
    return _gpus([int(each) for each in numbers.split(",")]) if numbers else {"cuda": torch.device("cuda")}


def use_device(device: torch.device) -> None:
    """Make a GPU with a number the current device of the calling thread. Each thread has its own."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def check_device(device: torch.device) -> None:
    """Wait for the work of a GPU. Do nothing for other devices.

    Raises:
        RuntimeError: An earlier operation has broken the GPU's context, so that this process cannot use it any more.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gpus(numbers: Sequence[int]) -> dict[str, torch.device]:
    """Return GPUs by their names. Raises ConfigError if one is missing, or if they are of several kinds."""
    found = torch.cuda.device_count()
    if missing := [each for each in numbers if each >= found]:
        raise ConfigError(
            f"device: cuda:{missing[0]} was requested, but torch finds {found} GPUs, cuda:0 to cuda:{found - 1}"
        )
    kinds = {f"cuda:{each}": torch.cuda.get_device_name(each) for each in numbers}
    if len(set(kinds.values())) > 1:  # the maps of a request would depend on the GPU that it gets
        raise ConfigError(
            f"device: the GPUs are of several kinds: {', '.join(f'{name} is {kind}' for name, kind in kinds.items())}; "
            "maps would depend on the GPU that computes them; name GPUs of one kind, and run one server for each kind"
        )
    return {f"cuda:{each}": torch.device("cuda", each) for each in numbers}
