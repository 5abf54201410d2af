"""Loading of models from configurations: sources, sizes, channels and heads. Each error names its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from camserve.v1 import explain_pb2 as pb
from camserve_server.config import Config, ModelConfig, read_config
from camserve_server.errors import ConfigError, InvalidArgument
from camserve_server.models.load import load, state_digest
from camserve_server.models.model import Model
from camserve_server.service.requests import decode_pixels, parse_explain
from camserve_server.torch_setup import torchvision_ops  # noqa: F401
from tests.support import noise

import timm  # isort: skip


def load_model(source: str, **keys: Any) -> Model:
    keys = {"allow_random_weights": True, **keys}
    return load(ModelConfig(name="m", source=source, **keys), torch.device("cpu"))


# ---- networks for python: --------------------------------------------------------------------------------------------


def grey() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def one_logit() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))


class Reused(nn.Module):
    """Network that contains its activation and its head under two names each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.block = nn.Sequential(self.conv, self.act)
        self.again = self.block
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.again(x).mean(dim=(2, 3)))
        return y


HERE = "python:tests.server.models.test_sources"


# ---- timm ------------------------------------------------------------------------------------------------------------


def test_timm_sets_the_preprocessing() -> None:
    model = load_model("timm:test_vit")
    assert str(model.preprocessing) == "squash 160x160 bicubic, mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5]"
    assert model.random_weights
    keys = {"mean": [0.1, 0.2, 0.3], "input_size": [96, 64], "interpolation": "nearest"}
    model = load_model("timm:test_vit", **keys)
    assert str(model.preprocessing) == "squash 96x64 nearest, mean [0.1, 0.2, 0.3], std [0.5, 0.5, 0.5]"
    assert model.attention_grid == (6, 4)


def test_random_weights_are_reproducible() -> None:
    assert load_model("timm:test_vit").digest == load_model("timm:test_vit").digest


def test_timm_network_loads_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(7)
    net = timm.create_model("test_vit")
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    config = ModelConfig(name="m", source="timm:test_vit", weights=str(tmp_path / "w.safetensors"))
    model = load(config, torch.device("cpu"))
    assert model.digest == state_digest(net)
    assert not model.random_weights


@pytest.mark.slow
@pytest.mark.parametrize("source", ["timm:test_vit", "torchvision:squeezenet1_1"])
def test_classes_key_allows_weights_with_another_number_of_classes(source: str, tmp_path: Path) -> None:
    finetuned = load_model(source, classes=3)
    assert finetuned.classes == 3
    save_file({k: v.contiguous() for k, v in finetuned.module.state_dict().items()}, tmp_path / "finetuned.safetensors")
    config = ModelConfig(name="m", source=source, weights=str(tmp_path / "finetuned.safetensors"))
    with pytest.raises(ConfigError, match=r"models\.m\.weights"):
        load(config, torch.device("cpu"))
    loaded = load(config.model_copy(update={"classes": 3}), torch.device("cpu"))
    assert loaded.digest == finetuned.digest


def test_pretrained_weights_are_requested_from_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    create = timm.create_model

    def record(name: str, **options: Any) -> nn.Module:
        calls.append(options)
        net: nn.Module = create(name, **{**options, "pretrained": False})
        return net

    monkeypatch.setattr(timm, "create_model", record)
    load_model("timm:test_resnet", weights="pretrained", allow_random_weights=False)
    assert calls == [{"pretrained": True}]


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "size", "layer", "grid"),
    [
        ("timm:test_vit", (64, 96), "blocks.4", (4, 6)),
        ("timm:swin_tiny_patch4_window7_224", (64, 96), "norm", (2, 3)),
        ("timm:test_resnet", (64, 96), "layer4", (2, 3)),
        ("torchvision:vit_b_32", (64, 64), "encoder.layers.encoder_layer_10", (2, 2)),
        ("torchvision:swin_t", (64, 96), "norm", (2, 3)),
    ],
)
def test_network_is_built_for_the_configured_size(
    source: str, size: tuple[int, int], layer: str, grid: tuple[int, int]
) -> None:
    default_layer = load_model(source, input_size=size).layer
    assert default_layer is not None
    assert (default_layer.name, (default_layer.height, default_layer.width)) == (layer, grid)


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_configured_layers_replace_the_defaults() -> None:
    model = load_model("torchvision:resnet18", input_size=(64, 64), layers=["layer1.0.relu#2", "layer2"])
    assert [layer.name for layer in model.default_layers(many=True)] == ["layer1.0.relu#2", "layer2"]
    assert [layer.name for layer in model.default_layers(many=False)] == ["layer2"]
    model = load_model("torchvision:resnet18", input_size=(64, 64), layer="layer3#1")
    assert [layer.name for layer in model.default_layers(many=True)][-1] == "layer4"
    assert [layer.name for layer in model.default_layers(many=False)] == ["layer3"]


@pytest.mark.slow
def test_head_is_configured_or_depends_on_the_number_of_logits() -> None:
    assert load_model("timm:test_resnet").head == "softmax"
    assert load_model("timm:test_resnet", head="sigmoid").head == "sigmoid"
    assert load_model(f"{HERE}:one_logit").head == "sigmoid"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "keys", "message"),
    [
        ("timm:nix", {}, "models.m.source: timm has no model 'nix'"),
        ("timm:test_vit", {"allow_random_weights": False}, 'models.m.weights: give a file or "pretrained"'),
        (
            "timm:test_vit",
            {"weights": "none.pt"},
            "models.m.weights: 'none.pt' is neither a file nor a known name; expected .* timm: pretrained",
        ),
        ("timm:vit_small_patch14_dinov2", {}, "models.m.classes: .* has no classifier: .* set classes, and weights"),
        ("timm:resnet50_clip.openai", {"weights": "pretrained"}, "models.m.classes: .* has no classifier"),
        (
            "timm:mvitv2_tiny",
            {"input_size": (64, 80)},
            "models.m.input_size: timm cannot build mvitv2_tiny for this input size",
        ),
        ("torchvision:vit_b_16", {"input_size": (64, 80)}, "models.m.input_size: .* takes squares, not 64x80"),
        ("torchvision:vit_b_16", {"input_size": (65, 65)}, "models.m.input_size: "),
        ("torchvision:resnet18", {"input_size": (1, 1), "layer": "x"}, "models.m.layer: there is no layer 'x'"),
        ("timm:test_resnet", {"layer": "layer1.0.nix"}, "models.m.layer: .* similar names: layer1.0"),
        ("torchvision:resnet18", {"layer": "layer2.0.relu"}, r"models.m.layer: .* such as layer2\.0\.relu#2"),
        ("torchvision:resnet18", {"layers": ["layer2", "nix"]}, "models.m.layers: there is no layer 'nix'"),
        (
            "torchvision:resnet18",
            {"layers": ["layer2", "layer1"]},
            "models.m.layers: .* an order from fine to coarse",
        ),
        ("timm:test_resnet", {"token_grid": (5, 5)}, "models.m.token_grid: "),
        (f"{HERE}:one_logit", {"head": "softmax"}, "models.m.head: the softmax of a single logit is always 1"),
        (f"{HERE}:one_logit", {"mean": [0.5]}, "models.m.std: std has 3 numbers and mean has 1; give both"),
        (f"{HERE}:one_logit", {"mean": [0.5], "std": [1]}, "models.m.mean: the network's input has 3 channels"),
        (f"{HERE}:grey", {"mean": [0.5] * 3}, "models.m.mean: the network's input has one channel"),
        (f"{HERE}:grey", {"std": [0.5] * 3}, "models.m.mean: the network's input has one channel"),
        ("timm:test_vit", {"input_size": (8, 8)}, "models.m.input_size: "),
    ],
)
def test_error_of_a_model_names_its_key(source: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(source, **keys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"mean = {[0.5] * 17}", "^models.m.mean: .*17 numbers; expected three, one for"),
        ("std = [0.5, 0.0, 0.5]", "^models.m.std.1: .*greater than 0"),
        ("name = 'n'", "camserve.toml"),
        ("\n[[models]]\nsource = 'timm:test_vit'", "^models.1.name: "),
        ('head = "both"', "head: "),
        ("token_grid = [0, 3]", "token_grid.0: "),
        ("token_grid = [7]", "token_grid"),
        ("layer = 3", "layer: "),
    ],
)
def test_error_of_a_value_names_its_key(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "camserve.toml"
    path.write_text(f'[[models]]\nname = "m"\nsource = "timm:test_vit"\n{line}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_config(path)


@pytest.mark.parametrize(
    "data",
    [b"a\nb\nc", b"a\nb\nc\n", b"a\r\nb\r\nc\r\n\r\n", b"\xef\xbb\xbfa\nb\nc\n", b"a\nb\nc\n\n \n"],
)
def test_label_files_of_other_editors_are_read(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(data)
    assert load_model(f"{HERE}:grey", labels=str(tmp_path / "labels.txt")).labels == ("a", "b", "c")


def test_layer_can_have_any_name_of_its_module() -> None:
    keys = {"layers": ["again.1"], "layer": "again#1", "fold_batch_norm": False}
    model = load_model(f"{HERE}:Reused", input_size=(16, 16), **keys)
    assert [layer.name for layer in model.layers] == ["act"]
    assert model.layer is not None
    assert model.layer.name == "block"
    assert [layer.name for layer in model.find_layers(["block.0", "again.1"], "layers")] == ["conv", "act"]
    with pytest.raises(InvalidArgument, match="named twice"):
        model.find_layers(["act", "again.1"], "layers")


# ---- grey-scale ------------------------------------------------------------------------------------------------------


def decoded(model: Model, **image: Any) -> Tensor:
    request = pb.ExplainRequest(image=pb.Image(**image), method=pb.MethodSpec(name="grad-cam"))
    config = Config()
    return decode_pixels(parse_explain(request, model, config), config).image.tensor


def test_grey_scale_network_receives_grey_images() -> None:
    model = load_model(f"{HERE}:grey", input_size=(24, 16))
    assert str(model.preprocessing) == "squash 24x16 bilinear, mean [0.5], std [0.5]"
    colours = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    grey = (colours @ np.array([0.299, 0.587, 0.114])) / 255 * 2 - 1
    received = decoded(model, pixels=pb.Pixels(height=24, width=16, data=colours.tobytes()))
    assert received.shape == (1, 24, 16)
    np.testing.assert_allclose(received[0], grey, atol=2 / 255)


def test_grey_image_keeps_its_values(tmp_path: Path) -> None:
    model = load_model(f"{HERE}:grey", input_size=(24, 16), mean=[0.0], std=[1.0])
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "grey.png")
    received = decoded(model, encoded=(tmp_path / "grey.png").read_bytes())
    np.testing.assert_allclose(received[0], pixels / 255, atol=1e-6)


def test_tensor_must_have_the_channels_of_the_network() -> None:
    model = load_model(f"{HERE}:grey", input_size=(24, 16))
    x = noise(1, 24, 16)
    received = decoded(model, tensor=pb.Tensor(shape=x.shape, data=x.numpy().tobytes()))
    assert torch.equal(received, x)
    x = noise(3, 24, 16)
    with pytest.raises(InvalidArgument, match=r"has the shape \[3, 24, 16\]; m expects \[1, 24, 16\]"):
        decoded(model, tensor=pb.Tensor(shape=x.shape, data=x.numpy().tobytes()))
