"""Folding of batch norm and padding into convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import skimage.data
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from camserve_server.config import ModelConfig, embedded_model
from camserve_server.errors import InvalidArgument
from camserve_server.models.fold import fold_batch_norm, fold_padding
from camserve_server.models.load import load
from camserve_server.models.model import Model, Precision
from camserve_server.torch_setup import torchvision_ops  # noqa: F401  (timm imports torchvision)
from tests.support import call, explained, noise

from timm.layers.create_conv2d import create_conv2d  # isort: skip
from timm.layers.norm_act import BatchNormAct2d  # isort: skip

CPU = torch.device("cpu")


class Net(nn.Module):
    """Network with pairs that can be folded (a, d, e) and convolutions that cannot: b has two users, c runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.b_bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c, self.c_bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.d, self.d_bn = nn.Conv2d(8, 8, 3, groups=4, bias=False), BatchNormAct2d(8)
        self.e, self.e_bn = nn.Conv2d(8, 6, 3, stride=2), nn.BatchNorm2d(6, affine=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_bn(self.a(x)).relu_()
        b = self.b(x)
        x = self.b_bn(b) + b
        x = self.c_bn(self.c(self.c(x)))
        x = self.e_bn(self.e(self.d_bn(self.d(x))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def as_trained(net: nn.Module) -> nn.Module:
    """Give batch norm statistics and affine parameters that differ from those of a new network."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]


def test_batch_norm_is_folded_into_the_convolution_that_it_alone_uses() -> None:
    torch.manual_seed(0)
    net: Any = as_trained(Net())
    x = noise(2, 3, 16, 16)
    seen: list[Tensor] = []
    before = net(x)
    with_hook = net.d_bn.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    net(x)
    with_hook.remove()

    # The output of b has a second user besides its batch norm. Only the changed logits show that.
    assert fold_batch_norm(net, x[:1]) == {}
    assert torch.equal(net(x), before)
    assert fold_batch_norm(net, x[:1], keep={"b"}) == {"a": "a_bn", "d": "d_bn", "e": "e_bn"}

    assert isinstance(net.a_bn, nn.Identity) and [*dict(net.d_bn.named_children())] == ["drop", "act"]
    assert net.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-5)
    net.d_bn.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    net(x)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-5)


def test_convolution_with_a_computed_weight_is_not_folded() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Flatten())
    assert fold_batch_norm(as_trained(net), noise(1, 3, 5, 5)) == {}


@pytest.mark.parametrize("size", [(16, 16), (15, 16), (17, 9)])
def test_same_padding_is_folded_into_the_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(
        create_conv2d(3, 8, 3, stride=2, padding="same", bias=True),  # type: ignore[no-untyped-call]
        create_conv2d(8, 8, 5, stride=2, padding="same", depthwise=True),  # type: ignore[no-untyped-call]
        create_conv2d(8, 6, 3, stride=1, padding="same", dilation=2),  # type: ignore[no-untyped-call]
    )
    net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = noise(2, 3, *size)
    before = net(x)
    fold_padding(net, x[:1])
    assert type(net[0]) is type(net[1]) is nn.Conv2d
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-6)


def test_convolution_with_inputs_of_several_sizes_keeps_its_padding() -> None:
    net = Twice()
    x = noise(1, 3, 16, 16)
    before = net(x)
    fold_padding(net, x)
    assert type(net.conv) is not nn.Conv2d and torch.equal(net(x), before)


class Twice(nn.Module):
    """Network that uses one convolution for inputs of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = create_conv2d(3, 3, 3, stride=2, padding="same").requires_grad_(False)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.conv(x))
        return y.flatten(1)


def load_lite0(precision: Precision) -> tuple[Model, Model]:
    """Return the embedded network without and with folding."""
    settings = embedded_model().model_copy(update={"precision": (precision,), "input_size": (112, 112)})
    plain, folded = (settings.model_copy(update={"fold_batch_norm": fold}) for fold in (False, True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("camserve_server.models.load.fold_padding", lambda *_: None)
        models = [load(plain, CPU)]
    models.append(load(folded, CPU))
    for model in models:
        model.batch_sizes = {"forward": 4, "gradient": 2, "ascend": 1}
    return models[0], models[1]


@pytest.fixture(scope="module")
def lite0() -> tuple[Model, Model]:
    return load_lite0("fp32")


@pytest.mark.slow
def test_folding_keeps_digest_and_layers_of_the_embedded_network(lite0: tuple[Model, Model]) -> None:
    plain, folded = lite0
    assert not [name for name, each in folded.module.named_modules() if type(each).__name__ == "Conv2dSame"]
    assert len(folded.folded) == 49 and not any(isinstance(m, nn.BatchNorm2d) for m in folded.module.modules())
    assert (folded.digest, folded.layers, folded.layer) == (plain.digest, plain.layers, plain.layer)
    assert [*folded.spatial] == [name for name in plain.spatial if name not in folded.folded]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layers"),
    [("grad-cam", None), ("grad-cam++", None), ("poly-cam", ["blocks.1.0.bn1"])],
)
def test_maps_are_the_same(lite0: tuple[Model, Model], method: str, layers: list[str] | None) -> None:
    x = lite0[0].preprocessing(skimage.data.chelsea())
    maps = [explained(each, x, call(each, method, layers), [285]).maps for each in lite0]
    torch.testing.assert_close(maps[1], maps[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_input_gradients_are_the_same_in_double_precision() -> None:
    """The gradient jumps where an input of ReLU6 crosses 0 or 6, and single precision rounds some inputs across."""
    models = load_lite0("fp64")
    x = models[0].preprocessing(skimage.data.chelsea())
    maps = [explained(each, x, call(each, "input-x-gradient"), [285]).maps for each in models]
    torch.testing.assert_close(maps[1], maps[0], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_folded_convolution_cannot_be_named() -> None:
    config = ModelConfig(name="r", source="torchvision:resnet18", allow_random_weights=True, input_size=(32, 32))
    with pytest.raises(
        InvalidArgument, match=r"r computes layer1\.0\.conv1 in one step with layer1\.0\.bn1; name that"
    ):
        load(config, CPU).find_layers(["layer1.0.conv1"], "layers")
    named = load(config.model_copy(update={"layers": ["layer1.0.conv1", "layer3"]}), CPU)
    assert [layer.name for layer in named.find_layers(["layer1.0.conv1"], "layers")] == ["layer1.0.conv1"]
    assert "layer1.0.conv2" in named.folded
    plain = load(config.model_copy(update={"fold_batch_norm": False}), CPU)
    assert plain.find_layers(["layer1.0.conv1"], "layers")
