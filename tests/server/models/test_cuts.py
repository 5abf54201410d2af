"""Cut values, and the choice of default layers among cuts."""

from __future__ import annotations

from typing import Any

import pytest
import structlog
import torch
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import Unservable
from camserve_server.models.cuts import MAX_CUT, CutMeter, layers_with_cuts, measure_cuts
from camserve_server.models.load import load
from camserve_server.models.probe import probe
from tests import nets
from tests.support import as_model, call, explained, noise, without_calls

import timm  # isort: skip
import torchvision  # isort: skip

HERE = "python:tests.server.models.test_cuts"
X = noise(1, 3, 32, 32)


def conv(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.LazyConv2d(channels, 3, stride, 1)


class Net(nn.Module):
    """A stem of 8×8 positions, a part that a subclass defines, and a linear head on the means of its channels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.act, self.fc = conv(8, 4), nn.ReLU(), nn.LazyLinear(5)
        self.define()
        self.eval()(X)

    def define(self) -> None: ...

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.middle(self.act(self.stem(x))).mean(dim=(2, 3)))
        return logits


def dense() -> nn.Module:
    """Return a network with the parts of a DenseNet: its last ReLU module is in a side branch."""

    class Dense(Net):
        def define(self) -> None:
            self.down, self.branch, self.relu, self.norm = conv(8, 2), conv(4), nn.ReLU(), nn.LazyBatchNorm2d()

        def middle(self, x: Tensor) -> Tensor:
            x = self.down(x)
            return torch.relu(self.norm(torch.cat([x, self.relu(self.branch(x))], dim=1)))

    return Dense()


def names(layers: Any) -> list[str]:
    return [layer.name for layer in layers]


# ---- cut values ------------------------------------------------------------------------------------------------------


def output(net: nn.Module, name: str, x: Tensor, new: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the output of a module and the logits for x; `new` replaces the output."""
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        kept.append(output.clone())
        return new

    handle = net.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        y = net(x)
    handle.remove()
    return kept[0], y


@pytest.mark.parametrize(("name", "is_cut"), [("relu", False), ("branch", False), ("down", True), ("act", True)])
def test_cut_value_is_that_of_the_definition(name: str, is_cut: bool) -> None:
    net = dense()
    meter = CutMeter(net, X)
    values = []
    for i in range(len(meter.images)):
        A, y_A = output(net, name, meter.images[i - 1 : i or None])
        _, y_B = output(net, name, meter.images[i : i + 1])
        _, z = output(net, name, meter.images[i : i + 1], new=A)
        values.append(float((z - y_A).norm() / (y_B - y_A).norm()))
    measured = meter.value(probe(net, X).spatial[name])
    assert measured == pytest.approx(max(values), rel=1e-3, abs=1e-5)
    assert measured is not None
    assert (measured < 1e-5) if is_cut else (measured > 0.5)


def test_layers_in_a_side_branch_are_not_chosen() -> None:
    found = probe(dense(), X)
    assert found.layer is not None
    assert found.layer.name == "norm"
    assert names(found.layers) == ["act", "norm"]
    assert found.warnings == ()
    assert [layer.cut for layer in found.layers] == [pytest.approx(0, abs=1e-5)] * 2
    assert found.spatial["act"].cut is not None
    assert found.spatial["relu"].cut is None
    [relu] = measure_cuts(dense(), X, [found.spatial["relu"]])
    assert relu.cut is not None
    assert relu.cut > 0.5


def test_cut_values_of_all_layers_of_a_model() -> None:
    values = {layer.name: layer.cut for layer in layers_with_cuts(as_model(dense()))}
    assert list(values) == ["stem", "act", "down", "branch", "relu", "norm"]
    assert all(value is not None for value in values.values())
    assert {name for name, value in values.items() if value is not None and value > MAX_CUT} == {"branch", "relu"}


def test_non_negative_cuts_are_preferred_for_several_layers_only() -> None:
    class Signed(Net):
        def define(self) -> None:
            self.last = conv(8)

        def middle(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(x)
            return y

    found = probe(Signed(), X)
    assert names(found.layers) == ["act"]
    assert found.layer is not None
    assert found.layer.name == "last"


class Parallel(nn.Module):
    """Two branches that meet only in the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(3, 4, 4, 4), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        means = [each(x).relu().mean(dim=(2, 3)) for each in (self.a, self.b)]
        logits: Tensor = self.fc(torch.cat(means, dim=1))
        return logits


def test_network_without_cuts_gets_the_best_layer_and_a_warning() -> None:
    found = probe(Parallel().eval(), X)
    assert found.layers == ()
    assert found.layer is not None
    assert found.layer.cut is not None
    assert found.layer.cut > MAX_CUT
    assert len(found.warnings) == 1
    assert f"passes through the layer {found.layer.name} (cut value {found.layer.cut:.2f})" in found.warnings[0]
    with pytest.raises(Unservable, match="passes through none of its layers; name the layers"):
        as_model(Parallel()).default_layers(many=True)


def test_resolution_without_a_cut_is_left_out() -> None:
    class Skipping(Net):
        def define(self) -> None:
            self.down, self.side, self.end = conv(8, 2), conv(8, 4), conv(8, 2)

        def middle(self, x: Tensor) -> Tensor:
            y: Tensor = self.end(self.down(x).relu()) + self.side(x)
            return y

    net = Skipping()
    found = probe(net, X)
    assert names(found.layers) == ["act"]
    assert found.layer is not None
    assert found.layer.name == "act"
    assert found.warnings == (
        "the layer act has 8 × 8 positions, because all information in the logits passes through no layer with 2 × 2; "
        "set layer to choose another",
    )


def test_cuts_are_measured_without_a_graph() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = dense()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                logits: Tensor = self.net(x)
                return logits

    found = probe(Frozen(), X)
    assert names(found.layers) == ["net.act", "net.norm"]
    assert found.layer is not None
    assert found.layer.name == "net.norm"


def test_network_for_single_images_is_measured() -> None:
    class Single(Net):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 1
            return super().forward(x)

    found = probe(Single(), X)
    assert names(found.layers) == ["act"]
    assert found.layers[0].cut == pytest.approx(0, abs=1e-5)


def test_untrained_head_with_zero_weights_does_not_hide_the_layers() -> None:
    net: Any = dense()
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    found = probe(net, X)
    assert names(found.layers) == ["act", "norm"]
    assert not net.fc.weight.any()
    assert not net(X).any()


def test_constant_logits_have_no_cut_value() -> None:
    net: Any = dense()
    nn.init.zeros_(net.stem.weight)
    found = probe(net, X)
    assert {layer.cut for layer in found.layers} == {None}


# ---- poolings --------------------------------------------------------------------------------------------------------


class PoolMixer(nn.Module):
    """Module with "Pool" in its name, whose output has as many positions as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x - self.pool(x)
        return y


@pytest.mark.parametrize(
    ("modules", "single"),
    [
        ([PoolMixer()], "part.0"),
        ([nn.ReLU(), nn.Identity()], "part.0"),
        ([nn.ReLU(), nn.AdaptiveAvgPool2d(8)], "part.0"),
        ([nn.ReLU(), nn.MaxPool2d(2)], "part.0"),
        ([nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.AdaptiveAvgPool2d(4)], "part.0"),
        ([nn.ReLU(), nn.MaxPool2d(4), nn.AdaptiveAvgPool2d(7)], "part.0"),
        ([nn.ReLU(), nn.AvgPool2d(2), conv(6)], "part.2"),
    ],
)
def test_poolings_are_outputs_with_fewer_positions(modules: list[nn.Module], single: str) -> None:
    class Pooled(Net):
        def define(self) -> None:
            self.act = nn.Tanh()  # type: ignore[assignment]
            self.part = nn.Sequential(*modules)

        def middle(self, x: Tensor) -> Tensor:
            y: Tensor = self.part(x)
            return y

    found = probe(Pooled(), X)
    assert found.layer is not None
    assert found.layer.module in (single, "part")
    assert (found.layer.height, found.layer.width) == ((4, 4) if single == "part.2" else (8, 8))


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_tokens_without_a_gradient_are_not_chosen() -> None:
    found = probe(nets.tiny_vit(), X)
    assert found.layer is not None
    assert found.layer.name == "blocks.1"  # only the class token of blocks.2 reaches the logits
    model = as_model(nets.tiny_vit())
    result = explained(model, X[0], call(model, "grad-cam"), [0, 1, 2])
    assert all(result.maps.flatten(1).amax(dim=1) > 0)


# ---- reports -------------------------------------------------------------------------------------------------------


def test_configured_layer_in_a_side_branch_is_reported() -> None:
    config = ModelConfig(name="m", source=f"{HERE}:dense", input_size=(32, 32), layer="relu")
    with structlog.testing.capture_logs() as logs:
        model = load(config, torch.device("cpu"))
    assert model.layer is not None
    assert model.layer.cut is not None
    assert model.layer.cut > 0.5
    [warning] = model.warnings
    assert warning.startswith("only a part of the information in the logits passes through the configured layer relu")
    assert [each["reason"] for each in logs if each["log_level"] == "warning"] == [warning]
    with structlog.testing.capture_logs() as logs:
        assert load(config.model_copy(update={"layer": "down"}), torch.device("cpu")).warnings == ()
    assert without_calls(logs) == []


# ---- published networks ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resnet50_of_torchvision_and_timm_have_the_same_layers_and_maps() -> None:
    ours = nets.calibrated("resnet50")
    theirs = timm.create_model("resnet50").eval()
    theirs.load_state_dict(ours.state_dict())
    models = [as_model(net, (64, 64)) for net in (ours, theirs)]
    assert [[layer.name for layer in model.layers] for model in models] == [
        ["relu", "layer1", "layer2", "layer3", "layer4"],
        ["act1", "layer1", "layer2", "layer3", "layer4"],
    ]
    x = noise(3, 64, 64)
    for method in ("grad-cam", "layer-cam", "poly-cam+"):
        maps = [explained(model, x, call(model, method), budget=100).maps for model in models]
        assert torch.equal(maps[0], maps[1]), method


# name: the layer for methods of one layer, the last two of the layers for methods of several
PUBLISHED = {
    "timm:rexnet_100": ("features", "features.5.act_dw features.11.act_dw"),
    "timm:starnet_s1": ("norm", "stages.2 norm"),
    "timm:nextvit_small": ("norm", "stages.2 norm"),
    "timm:pvt_v2_b0": ("stages", "stages.2 stages"),
    "timm:convformer_s18": ("stages", "stages.3.downsample.norm stages"),
    "timm:poolformer_s12": ("stages", "stages.2 stages"),
    "timm:poolformerv2_s12": ("stages", "stages.3.downsample.norm stages"),
    "timm:shvit_s1": ("stages", "stages.2.downsample.2.act1 stages.2.downsample.2.se"),
    "timm:nest_tiny": ("norm", "levels.2.pool.norm norm"),
    "timm:mobilevitv2_050": ("stages", "stages.4.0.conv1_1x1 stages"),
    "timm:efficientvit_b0": ("head.in_conv", "stages.3.blocks.0.main.inverted_conv head.in_conv"),
    "timm:levit_128s": ("stages", "stages.1 stages"),
    "timm:mvitv2_tiny": ("norm", "stages.3.blocks.0.norm1 norm"),
    "torchvision:maxvit_t": ("blocks.3", "blocks.2 blocks.3"),
    "torchvision:densenet121": ("features", "features.transition3.relu features"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_default_layers_of_published_networks_are_cuts(name: str) -> None:
    library, _, rest = name.partition(":")
    torch.manual_seed(0)
    net = torchvision.models.get_model(rest) if library == "torchvision" else timm.create_model(rest)
    found = probe(net.eval().requires_grad_(False), noise(1, 3, 224, 224))
    single, several = PUBLISHED[name]
    assert found.layer is not None
    assert found.layer.name == single
    assert names(found.layers[-2:]) == several.split()
    assert all(layer.cut is not None and layer.cut < MAX_CUT for layer in (*found.layers, found.layer))
    assert found.warnings == ()
