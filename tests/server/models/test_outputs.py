"""Forms of inputs and outputs of networks, and the messages for networks that cannot be served."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camserve.v1 import explain_pb2 as pb
from camserve_server.config import Config, ModelConfig
from camserve_server.errors import ConfigError, InvalidArgument
from camserve_server.models.load import load
from camserve_server.models.model import Model
from camserve_server.service.requests import decode_pixels, parse_explain
from tests.support import call, explained, noise

HERE = "python:tests.server.models.test_outputs"
X = noise(1, 3, 16, 16)


def load_model(network: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, **keys: Any) -> Model:
    monkeypatch.setitem(globals(), "made", network)
    return load(ModelConfig(name="m", source=f"{HERE}:made", **{"input_size": (16, 16), **keys}), torch.device("cpu"))


def plain(channels: int = 3, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    )


class Returning(nn.Module):
    """The plain network, with its output in another form."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.form = plain(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


@dataclass
class ImageClassifierOutput:
    """Like the output of Hugging Face's transformers."""

    logits: Tensor
    loss: Tensor | None = None


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "object": ImageClassifierOutput,
    "dictionary": lambda y: {"logits": y, "features": y[:, :2]},
    "ordered": lambda y: OrderedDict(logits=y),
    "tuple": lambda y: (y,),
    "tuple with maps": lambda y: (torch.zeros(len(y), 2, 4, 4), y, None),
    "list": lambda y: [y, y.sum()],
    "maps of one position": lambda y: y[:, :, None, None],
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(lambda: Returning(FORMS[form]), monkeypatch)
    assert torch.allclose(model.module(X), plain()(X), atol=1e-6)
    assert model.gap is not None
    assert not model.one_row
    model.batch_sizes.update({"forward": 2, "gradient": 2, "ascend": 2})
    assert explained(model, X[0], call(model, "grad-cam")).maps.any()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda y: {"out": y}, r"a dict with the keys out; .* return self\.net\(x\)\['out'\]"),
        (lambda y: (y, y), r"2 tensors have the shape \[N, classes\]; expected one; wrap the network"),
        (lambda y: (y.sum(),), "no tensors have the shape"),
        (lambda y: y.argmax(1), "of int64; expected logits, which are floating-point numbers"),
        (lambda y: y[:, None], r"a tensor \[1, 1, 3\] of float32; expected logits"),
        (lambda y: y[:, :, None, None].expand(-1, -1, 4, 4), r"a tensor \[1, 3, 4, 4\]"),
        (lambda y: None, "returns a NoneType"),
        (lambda y: "cat", "returns a str"),
    ],
)
def test_other_outputs_are_reported(form: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=rf"models\.m\.source: the network is not a classifier .*{message}"):
        load_model(lambda: Returning(form), monkeypatch)


# ---- inputs ----------------------------------------------------------------------------------------------------------


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, *, pixel_values: Tensor, output_attentions: bool = False) -> Tensor:
        y: Tensor = self.net(pixel_values)
        return y


class Second(KeywordOnly):
    def forward(self, input_ids: Any = None, pixel_values: Any = None) -> Tensor:  # type: ignore[override]
        assert input_ids is None
        y: Tensor = self.net(pixel_values)
        return y


class Defaults(KeywordOnly):
    def forward(self, image: Tensor, mask: Any = None, *, scale: float = 1.0, **more: Any) -> Tensor:  # type: ignore[override]
        y: Tensor = scale * self.net(image)
        return y


class Metadata(KeywordOnly):
    def forward(self, image: Tensor, age: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = self.net(image) * age
        return y


@pytest.mark.parametrize("network", [KeywordOnly, Second, Defaults])
def test_image_is_passed_under_its_name(network: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(network, monkeypatch)
    assert torch.allclose(model.module(X), plain()(X), atol=1e-6)
    model.batch_sizes.update({"forward": 2, "gradient": 2, "ascend": 2})
    assert explained(model, X[0], call(model, "grad-cam")).maps.any()


def test_further_inputs_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"models\.m\.source: forward\(\) needs the further inputs age"):
        load_model(Metadata, monkeypatch)


@pytest.mark.parametrize("channels", [2, 4, 16])
def test_networks_of_other_channels_take_tensors(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(lambda: plain(channels), monkeypatch)
    assert model.preprocessing.channels == channels
    x = noise(channels, 16, 16)
    method = pb.MethodSpec(name="grad-cam")
    tensor = pb.Image(tensor=pb.Tensor(shape=x.shape, data=x.numpy().tobytes()))
    model.batch_sizes.update({"forward": 2, "gradient": 2, "ascend": 2})
    parsed = parse_explain(pb.ExplainRequest(image=tensor, method=method), model, Config())
    assert torch.equal(decode_pixels(parsed, Config()).image.tensor, x)
    assert explained(model, x, call(model, "grad-cam")).maps.any()
    pixels = pb.Pixels(height=16, width=16, data=np.zeros((16, 16, 3), np.uint8).tobytes())
    with pytest.raises(InvalidArgument, match=rf"takes {channels} channels, .* send a tensor \[{channels}, "):
        parse_explain(pb.ExplainRequest(image=pb.Image(pixels=pixels), method=method), model, Config())


def test_configured_channels_have_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(lambda: plain(4), monkeypatch, mean=[0.1] * 4, std=[0.2] * 4)
    assert model.preprocessing.mean == (0.1,) * 4
    with pytest.raises(ConfigError, match=r"models\.m\.mean: the network's input has 4 channels, but mean has 3"):
        load_model(lambda: plain(4), monkeypatch, mean=[0.1] * 3)


class OutOfOrder(nn.Module):
    """Network whose first convolution in the order of definition does not receive the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.second, self.first, self.fc = nn.Conv2d(8, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.second(self.first(x)).mean(dim=(2, 3)))
        return y


def test_colour_is_tried_before_the_channels_of_the_first_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(OutOfOrder, monkeypatch).preprocessing.channels == 3


@pytest.mark.parametrize(
    "network",
    [
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)),
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(4, 2)),
    ],
)
def test_networks_of_volumes_are_refused(network: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"models\.m\.source: the network has 3-D convolutions; only .* 2-D images"):
        load_model(network, monkeypatch)


def test_lazy_modules_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"models\.m\.source: .* has no values; .* call the network once"):
        load_model(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)), monkeypatch)


class Asserting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 32
        y: Tensor = self.net(x)
        return y


def test_message_of_an_assertion_without_text_names_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"models\.m\.input_size: .* \[1, 3, 16, 16\]: AssertionError.*; set input"):
        load_model(Asserting, monkeypatch)


@pytest.mark.slow
def test_classifiers_of_transformers_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")

    def vit() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        )
        net: nn.Module = transformers.ViTForImageClassification(config)
        return net

    assert load_model(vit, monkeypatch, input_size=(32, 32)).classes == 2
