"""TorchScript archives and exported programs: methods without gradients of layers, and errors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError, Unservable
from camserve_server.models.load import load
from camserve_server.models.model import Model
from tests.support import as_model, call, explained, metric, noise

KINDS = ["torchscript", "export"]


class Net(nn.Module):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.relu(self.conv(x)).mean(dim=(2, 3)))
        return result


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def saved(kind: str, net: nn.Module, path: Path) -> Path:
    x = torch.zeros(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "torchscript":
            torch.jit.trace(net, x).save(str(path))  # type: ignore[no-untyped-call]
        else:
            torch.export.save(torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), path)
    return path


def load_file(kind: str, path: Path, **keys: Any) -> Model:
    keys = {"allow_code": True, "input_size": (16, 16), **keys}
    model = load(ModelConfig(name="m", source=f"{kind}:{path}", **keys), torch.device("cpu"))
    model.batch_sizes = {"forward": 4, "gradient": 4, "ascend": 4}
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_methods_without_layers_have_the_maps_of_the_network(kind: str, net: nn.Module, tmp_path: Path) -> None:
    model, original = load_file(kind, saved(kind, net, tmp_path / "net.pt2")), as_model(net, (16, 16))
    x = noise(3, 16, 16)
    for method in ("occlusion", "rise"):
        ours, theirs = (explained(each, x, call(each, method), 1).maps for each in (model, original))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, msg=method)


@pytest.mark.slow
def test_randomisation_of_a_network_without_weights_is_refused() -> None:
    class Means(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3))

    model = as_model(Means(), (16, 16))
    with pytest.raises(Unservable, match="no weights that the server can make random"):
        explained(model, noise(3, 16, 16), call(model, "occlusion"), 1, [metric("randomisation-ssim")])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_image_are_available(kind: str, net: nn.Module, tmp_path: Path) -> None:
    model, original = load_file(kind, saved(kind, net, tmp_path / "net.pt2")), as_model(net, (16, 16))
    x = noise(3, 16, 16)
    ours, theirs = (explained(each, x, call(each, "input-x-gradient"), 1).maps for each in (model, original))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_code_must_be_allowed(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"models.m.allow_code: a file of {kind}: contains code.* = true"):
        load_file(kind, tmp_path / "net.pt2", allow_code=False)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_file_and_other_content_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"models.m.source: there is no file .*; expected {kind}:FILE"):
        load_file(kind, tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("no network")
    with pytest.raises(ConfigError, match=r"models.m.source: .* cannot be loaded: .*; expected a file of torch\."):
        load_file(kind, tmp_path / "text.pt2")


def test_keys_that_do_not_apply_are_refused() -> None:
    for keys in ({"weights": "a.pt"}, {"allow_random_weights": True}, {"allow_code": True}):
        with pytest.raises(ValueError, match=rf"{next(iter(keys))}: "):
            ModelConfig(name="m", source="onnx:a.onnx", **keys)
