"""Copies of a model on further devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.engine.warmup import warm_up
from camserve_server.models import copies
from camserve_server.models.copies import copied
from camserve_server.models.load import load
from tests.support import call, explained, noise

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"name": "tiny", "source": "python:tests.nets:tiny_cnn", "input_size": (32, 32)}


def test_copy_has_weights_of_its_own_and_shares_batch_sizes() -> None:
    model = load(ModelConfig(**TINY, precision=("fp32", "bf16", "fp64")), CPU)
    copy = copied(model, CPU, "cpu:1")
    assert [*copy.precisions] == [*model.precisions] == ["fp32", "bf16", "fp64"]
    for precision, each in copy.precisions.items():
        original = model.at(precision)
        ours, theirs = each.module.state_dict(), original.module.state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name])
            assert value.data_ptr() != theirs[name].data_ptr(), "hooks and weights are used by one thread"
        assert each.device_name == "cpu:1"
        assert each.throughput is not original.throughput
        original.batch_sizes["forward"] = 8
        assert each.batch_sizes["forward"] == 8, "also after a device has run out of memory"


def test_precisions_with_the_same_weights_share_the_network_of_the_copy() -> None:
    model = load(ModelConfig(**TINY), CPU)
    model.others = {"tf32": model.with_module(model.module, precision="tf32")}
    copy = copied(model, CPU, "cpu:1")
    assert copy.others["tf32"].module is copy.module
    assert copy.module is not model.module


@pytest.mark.parametrize("method", ["grad-cam", "cam", "score-cam", "opti-cam", "poly-cam"])
def test_copy_gives_the_same_bits(method: str) -> None:
    model = load(ModelConfig(**TINY), CPU)
    copy = copied(model, CPU, "cpu:1")
    warm_up(model, 4)
    warm_up(copy, 4)
    parameters: dict[str, Any] = {"steps": 4} if method == "opti-cam" else {}
    maps = [explained(each, noise(3, 32, 32), call(each, method, **parameters), 2).maps for each in (model, copy)]
    assert torch.equal(*maps)


def test_tensors_are_copied_directly_to_the_device_and_shared_ones_stay_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(tensor: Tensor, memo: dict[int, object]) -> Tensor:
        raise AssertionError("a copy on the device of the network needs memory there")

    network = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    network[2].weight = network[0].weight
    network[1].weight.requires_grad_(False)
    for kind in (Tensor, nn.Parameter):
        monkeypatch.setattr(kind, "__deepcopy__", refuse)
    for device in (CPU, torch.device("meta")):
        copy = copies._copied_module(network, CPU, device)
        assert isinstance(copy, nn.Sequential)
        assert copy[2].weight is copy[0].weight
        for name, value in network.state_dict(keep_vars=True).items():
            theirs = copy.state_dict(keep_vars=True)[name]
            assert (theirs.device, theirs.requires_grad, type(theirs)) == (device, value.requires_grad, type(value))
            assert theirs.data_ptr() != value.data_ptr()
            assert device.type == "meta" or torch.equal(theirs, value)


class Keeping(nn.Module):
    """A network with tensors that are neither parameters nor buffers, as code may keep them from its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.grid = torch.arange(3.0)
        self.by_size = {"3": [self.grid, torch.ones(3)]}
        self.elsewhere = torch.empty(2, device="meta")


def test_tensors_that_a_network_keeps_are_copied_to_the_device() -> None:
    network, meta = Keeping(), torch.device("meta")
    copy = copies._copied_module(network, CPU, CPU)
    assert isinstance(copy, Keeping)
    assert torch.equal(copy.grid, network.grid)
    assert copy.grid.data_ptr() != network.grid.data_ptr()
    assert copy.elsewhere.device == meta, "it was not on the device of the network"
    copy = copies._copied_module(network, CPU, meta)
    assert isinstance(copy, Keeping)
    first, second = copy.by_size["3"]
    assert first is copy.grid
    assert {each.device for each in (copy.conv.weight, first, second)} == {meta}
