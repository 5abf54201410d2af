"""Detection of layers of every form, of default layers and of a linear head behind global average pooling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.errors import InvalidArgument, Unservable
from camserve_server.models.layers import Layer
from camserve_server.models.probe import probe
from camserve_server.torch_setup import torchvision_ops  # noqa: F401
from tests import nets
from tests.support import as_model, noise

import timm  # isort: skip
import torchvision  # isort: skip


def build(name: str, **options: Any) -> nn.Module:
    """Return the untrained network "torchvision:NAME" or "timm:NAME"."""
    library, _, name = name.partition(":")
    torch.manual_seed(0)
    if library == "torchvision":
        net: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    else:
        net = timm.create_model(name, **options)
    return net.eval()


def outputs(net: nn.Module, x: Tensor, name: str) -> list[Tensor]:
    """Return the output of each call of the module."""
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda m, args, output: seen.append(output.clone()))
    with torch.no_grad():
        net(x)
    handle.remove()
    return seen


# ---- forms -----------------------------------------------------------------------------------------------------------


def test_grid_returns_maps_for_each_form() -> None:
    maps = noise(2, 5, 3, 4)
    tokens = torch.zeros(2, 2 + 12, 5)
    for i in range(3):
        for j in range(4):
            tokens[:, 2 + 4 * i + j] = maps[:, :, i, j]
    last = torch.stack([maps[:, k] for k in range(5)], dim=-1)
    for layer, output in (
        (Layer("a", 5, 3, 4), maps),
        (Layer("a", 5, 3, 4, form="NHWC"), last),
        (Layer("a", 5, 3, 4, form="tokens", prefix=2), tokens),
    ):
        assert torch.equal(layer.grid(output), maps)
        assert layer.grid(output).untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
        leaf = output.clone().requires_grad_()
        [gradient] = torch.autograd.grad((layer.grid(leaf) * maps).sum(), leaf)
        assert torch.equal(layer.grid(gradient), maps)
    assert not gradient[:, :2].any()


def test_layer_name_contains_module_and_call() -> None:
    assert (Layer("a.b#3", 1, 2, 2).module, Layer("a.b#3", 1, 2, 2).call) == ("a.b", 3)
    assert (Layer("a.b", 1, 2, 2).module, Layer("a.b", 1, 2, 2).call) == ("a.b", 1)


# name, options, size; the single default, its form, prefix and grid; the gap's layer; number of attention modules
TRANSFORMERS: list[tuple[str, dict[str, Any], tuple[int, int], tuple[str, str, int, int, int], str, int]] = [
    (
        "torchvision:vit_b_16",
        {"image_size": 64},
        (64, 64),
        ("encoder.layers.encoder_layer_10", "tokens", 1, 4, 4),
        "",
        12,
    ),
    ("timm:vit_tiny_patch16_224", {"img_size": (64, 96)}, (64, 96), ("blocks.10", "tokens", 1, 4, 6), "", 12),
    (
        "timm:deit_tiny_distilled_patch16_224",
        {"img_size": (64, 32)},
        (64, 32),
        ("blocks.10", "tokens", 2, 4, 2),
        "",
        12,
    ),
    (
        "timm:vit_small_patch14_reg4_dinov2",
        {"img_size": 56, "num_classes": 3},
        (56, 56),
        ("blocks.10", "tokens", 5, 4, 4),
        "",
        12,
    ),
    # a stem of convolutions, and a grid that is not the output of a patch embedding
    (
        "timm:vit_tiny_r_s16_p8_224",
        {"img_size": (64, 96)},
        (64, 96),
        ("blocks.10", "tokens", 1, 2, 3),
        "",
        12,
    ),
    ("torchvision:swin_t", {}, (64, 96), ("norm", "NHWC", 0, 2, 3), "permute", 0),
    (
        "timm:swin_tiny_patch4_window7_224",
        {"img_size": (64, 96)},
        (64, 96),
        ("norm", "NHWC", 0, 2, 3),
        "norm",
        0,
    ),
    # unsupported attention: a relative position bias, rotary embeddings, pooling by attention
    ("timm:beit_base_patch16_224", {"img_size": 32}, (32, 32), ("blocks.11", "tokens", 1, 2, 2), "", 0),
    ("timm:vit_relpos_small_patch16_224", {"img_size": 32}, (32, 32), ("blocks.11", "tokens", 0, 2, 2), "", 0),
    (
        "timm:eva02_tiny_patch14_224",
        {"img_size": 28, "num_classes": 3},
        (28, 28),
        ("blocks.11", "tokens", 1, 2, 2),
        "",
        0,
    ),
    (
        "timm:vit_base_patch16_siglip_224",
        {"img_size": 32, "num_classes": 3},
        (32, 32),
        ("norm", "tokens", 0, 2, 2),
        "",
        0,
    ),
    ("timm:mixer_s32_224", {"img_size": 64}, (64, 64), ("norm", "tokens", 0, 2, 2), "norm", 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "size", "single", "gap", "attention"), TRANSFORMERS)
def test_layers_of_transformers(
    name: str,
    options: dict[str, Any],
    size: tuple[int, int],
    single: tuple[str, str, int, int, int],
    gap: str,
    attention: int,
) -> None:
    structure = probe(build(name, **options), noise(1, 3, *size))
    assert structure.layer is not None
    layer = structure.layer
    assert (layer.name, layer.form, layer.prefix, layer.height, layer.width) == single
    assert structure.layers[-1] == layer
    assert (structure.gap.layer.name if structure.gap else "") == gap
    assert len(structure.attention) == attention
    assert (structure.attention_prefix, structure.attention_grid) == (
        (single[2], single[3:]) if attention else (0, None)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision:vit_b_16", "timm:vit_tiny_patch16_224"])
def test_every_position_of_the_default_layer_of_a_transformer_has_a_gradient(name: str) -> None:
    net = build(name, **({"image_size": 64} if "torchvision" in name else {"img_size": 64}))
    nn.init.normal_(
        [m for m in net.modules() if isinstance(m, nn.Linear)][-1].weight
    )  # torchvision initialises it with zeros
    layer = probe(net, noise(1, 3, 64, 64)).layer
    assert layer is not None
    kept: list[Tensor] = []
    net.get_submodule(layer.module).register_forward_hook(lambda m, args, output: kept.append(output))
    [gradient] = torch.autograd.grad(net(noise(1, 3, 64, 64))[0, 0], kept)
    assert (layer.grid(gradient).abs().sum(dim=1) > 0).all()


def test_modules_inside_attention_are_not_layers() -> None:
    net: Any = nets.tiny_vit()
    for block in net.blocks:
        block.attn.fused_attn = False  # attn_drop then runs on the weights [N, heads, L, L]
    structure = probe(net, noise(1, 3, 32, 32))
    assert not [name for name in structure.spatial if ".attn." in name]
    assert "blocks.0.attn" in structure.spatial


class Unnamed(nn.Module):
    """Network with attention that no module is named after."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.softmax, self.fc = nn.Conv2d(3, 8, 8, 8), nn.Softmax(dim=-1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.patches(x).flatten(2).transpose(1, 2).unflatten(2, (2, 4)).transpose(1, 2)
        heads = self.softmax(heads @ heads.transpose(2, 3)) @ heads
        logits: Tensor = self.fc(heads.transpose(1, 2).flatten(2).mean(dim=1))
        return logits


def test_attention_weights_are_not_a_layer() -> None:
    assert list(probe(Unnamed(), noise(1, 3, 32, 32)).spatial) == ["patches"]


@pytest.mark.slow
def test_windows_of_tokens_are_not_a_layer() -> None:
    net = build("timm:swin_tiny_patch4_window7_224", img_size=112)
    structure = probe(net, noise(1, 3, 112, 112))
    assert "layers.0.blocks.0.attn" not in structure.spatial  # [16 windows, 49, 96]
    assert structure.spatial["layers.0.blocks.0"].form == "NHWC"


@pytest.mark.slow
def test_configured_token_grid_is_used() -> None:
    net, x = build("timm:vit_tiny_patch16_224", img_size=(32, 128)), noise(1, 3, 32, 128)
    layer = probe(net, x, token_grid=(2, 8)).spatial["norm"]
    assert (layer.height, layer.width, layer.prefix) == (2, 8, 1)
    for wrong in ((5, 5), (4, 4), (8, 2)):
        assert "norm" not in probe(net, x, token_grid=wrong).spatial


@pytest.mark.slow
def test_tokens_in_another_order_are_not_a_layer() -> None:
    """The tokens of Hiera are ordered window by window; a map read row by row would be wrong."""
    net = build("timm:hiera_tiny_224", img_size=64)
    structure = probe(net, noise(1, 3, 64, 64))
    assert "tokens" not in {layer.form for layer in structure.spatial.values()}
    assert (structure.layer, structure.layers, structure.attention) == (None, (), ())


# ---- defaults --------------------------------------------------------------------------------------------------------

NETWORKS: list[tuple[str, list[str], str, str]] = [
    # name, the last two of the defaults, the single default, the gap's layer
    ("torchvision:resnet50", ["layer3", "layer4"], "layer4", "layer4"),
    ("torchvision:vgg16", ["features.22", "features.29"], "features.29", ""),
    ("timm:tf_efficientnet_lite0", ["blocks.5.0.bn1", "bn2"], "bn2", "bn2"),
    ("torchvision:efficientnet_b0", ["features.6.0.block.0", "features"], "features", "features"),
    ("torchvision:mobilenet_v3_small", ["features.9.block.0", "features"], "features", ""),
    ("torchvision:convnext_tiny", ["features.6.0", "features"], "features", ""),
    ("timm:convnext_atto", ["stages.3.downsample.0", "stages"], "stages", ""),
    (
        "torchvision:densenet121",
        ["features.transition3.relu", "features"],
        "features",
        "",  # its last ReLU is a function and not a module
    ),
    ("timm:densenet121", ["features.transition3.norm", "features"], "features", "features"),
    ("timm:mobilevit_xxs", ["stages.4.0.conv1_1x1", "final_conv"], "final_conv", "final_conv"),
    ("timm:nfnet_l0", ["stages.3.0.act1", "final_act"], "final_act", "final_act"),
    ("timm:resnetv2_50x1_bit", ["stages.3.blocks.0.norm1", "norm"], "norm", "norm"),  # its head is a 1×1 convolution
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "several", "single", "gap"), NETWORKS)
@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_layers_of_convolutional_networks(
    name: str, several: list[str], single: str, gap: str, size: tuple[int, int]
) -> None:
    structure = probe(build(name), noise(1, 3, *size))
    assert [layer.name for layer in structure.layers[-2:]] == several
    assert structure.layer is not None
    assert structure.layer.name == single
    assert structure.layer.form == "NCHW"
    assert (structure.gap.layer.name if structure.gap else "") == gap
    assert (structure.attention, structure.attention_grid) == ((), None)
    ratios = [layer.height / layer.width for layer in structure.layers]
    assert all((ratio > 1) == (size[0] > size[1]) for ratio in ratios)


class Reused(nn.Module):
    """Network that calls one activation module twice; no other output is non-negative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 9, 3, 2, 1), nn.Linear(9, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.relu(self.b(self.relu(self.a(x)))).mean(dim=(2, 3)))
        return logits


def test_calls_of_a_shared_activation_are_separate_layers() -> None:
    structure = probe(Reused(), noise(1, 3, 32, 32))
    assert [layer.name for layer in structure.layers] == ["relu#1", "relu#2"]
    assert structure.layer == structure.layers[-1]
    assert structure.gap is not None
    assert structure.gap.layer.name == "relu#2"


class InPlace(nn.Module):
    """Network that changes the output of an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Linear(8, 4)
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.add(self.act(self.conv(x))).mean(dim=(2, 3)))
        return logits


class Add(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5)


def test_module_that_works_in_place_is_not_an_activation() -> None:
    structure = probe(InPlace(), noise(1, 3, 32, 32))
    assert [layer.name for layer in structure.layers] == ["act"]
    assert structure.gap is not None
    assert structure.gap.layer.name == "add"


def test_network_without_spatial_outputs_has_no_layers() -> None:
    structure = probe(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), noise(1, 3, 4, 4))
    assert (structure.spatial, structure.layers, structure.layer, structure.gap, structure.classes) == (
        {},
        (),
        None,
        None,
        2,
    )
    model = as_model(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), (4, 4))
    for many in (True, False):
        with pytest.raises(Unservable):
            model.default_layers(many)


def test_network_without_logits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 8, 16, 16\] where logits"):
        probe(nn.Conv2d(3, 8, 3, 2, 1), noise(1, 3, 32, 32))
    with pytest.raises(ValueError, match="tuple where logits"):
        probe(nn.LSTM(4, 4), noise(4, 4))


def test_probe_removes_its_hooks() -> None:
    net = nets.tiny_vit()
    probe(net, noise(1, 3, 32, 32))
    # torch has no public function that lists hooks.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# ---- pooled heads ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("torchvision:resnet18", (64, 96)), ("torchvision:swin_t", (64, 64)), ("timm:resnetv2_50x1_bit", (64, 64))],
)
def test_linear_head_reproduces_the_logits_except_for_a_constant(name: str, size: tuple[int, int]) -> None:
    net = build(name)
    structure = probe(net, noise(1, 3, *size))
    assert structure.gap is not None
    assert structure.gap.weight(net).shape == (structure.classes, structure.gap.layer.channels)
    biases = []
    for seed in (1, 2):
        x = noise(1, 3, *size, seed=seed)
        [A] = outputs(net, x, structure.gap.layer.module)
        with torch.no_grad():
            biases.append(net(x) - structure.gap.layer.grid(A).mean(dim=(2, 3)) @ structure.gap.weight(net).T)
    torch.testing.assert_close(biases[0], biases[1], rtol=1e-3, atol=1e-4)


def test_other_heads_are_not_a_linear_head_behind_average_pooling() -> None:
    class Two(Reused):
        def forward(self, x: Tensor) -> Tensor:
            A = self.relu(self.b(self.relu(self.a(x))))
            logits: Tensor = self.fc(A.mean(dim=(2, 3))) + self.fc(A.amax(dim=(2, 3)))
            return logits

    class Largest(Reused):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.relu(self.b(self.relu(self.a(x)))).amax(dim=(2, 3)))
            return logits

    class Hidden(Reused):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    for kind in (Two, Largest, Hidden):
        torch.manual_seed(0)
        assert probe(kind(), noise(1, 3, 32, 32)).gap is None


# ---- naming ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_layer_name_selects_a_call_of_a_module() -> None:
    net, x = build("torchvision:resnet50"), noise(1, 3, 64, 64)
    model = as_model(net, (64, 64))
    third, block, first = model.find_layers(["layer2.0.relu#3", "layer2.0", "layer2.0.relu#1"], "layers")
    assert (third.call, third.module, third.channels, third.height) == (3, "layer2.0.relu", 512, 8)
    assert (first.channels, first.height) == (128, 16)
    assert torch.equal(outputs(net, x, third.module)[2], outputs(net, x, block.name)[0])
    assert model.find_layers(["layer2.0#1"], "layers") == (block,)


@pytest.mark.slow
def test_module_with_several_calls_needs_the_number_of_a_call() -> None:
    model = as_model(build("torchvision:resnet50"), (64, 64))
    with pytest.raises(InvalidArgument, match=r"it runs 3 times; name one call, such as layer2\.0\.relu#3") as caught:
        model.find_layers(["layer2.0", "layer2.0.relu"], "method.layers")
    assert caught.value.field == "method.layers[1]"
    for name in ("layer2.0.relu#4", "layer2.0#2", "layer2.0#x", "#1", ""):
        with pytest.raises(InvalidArgument):
            model.find_layers([name], "method.layers")


# ---- one channel, one logit ------------------------------------------------------------------------------------------


def test_grey_scale_network_with_one_logit() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    model = as_model(net, (24, 16), mean=(0.5,), std=(0.25,))
    assert (model.head, model.classes, model.preprocessing.channels) == ("sigmoid", 1, 1)
    assert model.image(noise(1, 24, 16)).mean.shape == (1, 1, 1)
    assert model.layer is not None
    assert model.layer.name == "1"


def test_sigmoid_head_gives_one_probability_for_each_label() -> None:
    model = as_model(nets.tiny_cnn(), head="sigmoid")
    logits = noise(2, 7)
    torch.testing.assert_close(model.probabilities(logits), logits.double().sigmoid())
    assert as_model(nets.tiny_cnn()).head == "softmax"
