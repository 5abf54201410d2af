"""The configuration key `device`, on machines with and without GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from camserve_server.config import read_config
from camserve_server.errors import ConfigError
from camserve_server.torch_setup.device import pick_device, pick_devices


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: Sequence[str]) -> None:
    """Let torch find GPUs with these names."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: gpus[i])


@pytest.mark.parametrize("value", ["auto", "all", "cpu", "cuda", "cuda:3", "cuda:0,1", "cuda:2,0,11", "cpu:0,1"])
def test_well_formed_values_are_accepted(value: str) -> None:
    assert read_config(device=value).device == value


@pytest.mark.parametrize(
    "value", ["", "gpu", "cpu:0", "cuda:", "cuda:0,", "cuda:0, 1", "cuda:0,cuda:1", "all:0", "0,1"]
)
def test_other_values_are_refused_with_examples(value: str) -> None:
    with pytest.raises(ConfigError, match=rf'^device: {value!r} is not a device; expected "auto", .* "cuda:0,1", or'):
        read_config(device=value)


@pytest.mark.parametrize("value", ["cuda:1,1", "cpu:0,2,0", "cuda:1,01"])
def test_device_that_is_named_twice_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=f"^device: '{value}' names a device twice"):
        read_config(device=value)


@pytest.mark.parametrize(
    ("value", "gpus", "names"),
    [
        ("auto", 0, ["cpu"]),
        ("auto", 2, ["cuda"]),
        ("cpu", 2, ["cpu"]),
        ("cpu:0,1", 0, ["cpu:0", "cpu:1"]),
        ("cuda", 2, ["cuda"]),
        ("cuda:1", 2, ["cuda:1"]),
        ("cuda:3,1", 4, ["cuda:3", "cuda:1"]),
        ("all", 1, ["cuda:0"]),
        ("all", 3, ["cuda:0", "cuda:1", "cuda:2"]),
    ],
)
def test_devices_of_a_value(monkeypatch: pytest.MonkeyPatch, value: str, gpus: int, names: list[str]) -> None:
    pretend(monkeypatch, ["H100"] * gpus)
    devices = pick_devices(value)
    assert [*devices] == names
    assert [*devices.values()] == [torch.device("cpu") if "cpu" in name else torch.device(name) for name in names]
    assert pick_device(value) == devices[names[0]]


@pytest.mark.parametrize("value", ["cuda", "cuda:0", "cuda:0,1", "all"])
def test_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    pretend(monkeypatch, [])
    with pytest.raises(ConfigError, match=f"^device: {value} was requested, but torch finds no GPU"):
        pick_devices(value)


def test_number_beyond_the_last_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ["H100", "H100"])
    with pytest.raises(ConfigError, match="cuda:2 was requested, but torch finds 2 GPUs, cuda:0 to cuda:1"):
        pick_devices("cuda:0,2")


@pytest.mark.parametrize("value", ["all", "cuda:0,2"])
def test_gpus_of_several_kinds_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The maps of a request would depend on the GPU that it gets."""
    pretend(monkeypatch, ["H100", "H100", "T4"])
    with pytest.raises(ConfigError, match=r"cuda:0 is H100.* cuda:2 is T4; maps would depend on the GPU"):
        pick_devices(value)
    assert [*pick_devices("cuda:0,1")] == ["cuda:0", "cuda:1"]
