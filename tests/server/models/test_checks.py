"""Outputs that depend on other images or on chance, memory formats, and networks without a classifier."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from structlog.testing import capture_logs
from torch import Tensor, nn

from camserve.v1 import explain_pb2 as pb
from camserve_server.config import Config, ModelConfig
from camserve_server.engine import warmup
from camserve_server.errors import ConfigError
from camserve_server.models.load import load, state_digest
from camserve_server.models.model import Model
from camserve_server.service.requests import parse_explain
from camserve_server.service.responses import loaded_message
from tests.nets import tiny_cnn
from tests.support import noise

HERE = "python:tests.server.models.test_checks"
NETWORKS: dict[str, Callable[[], nn.Module]] = {}
X = noise(1, 3, 16, 16)


def load_model(network: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, **keys: Any) -> Model:
    monkeypatch.setitem(globals(), "made", network)
    return load(ModelConfig(name="m", source=f"{HERE}:made", **{"input_size": (16, 16), **keys}), torch.device("cpu"))


class Classifier(nn.Module):
    """Small classifier. `change` maps the image [N, 3, H, W], `end` the pooled features [N, 8]."""

    def __init__(self, change: Any = None, end: Any = None, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.fc = nn.Linear(8, classes)
        self.change, self.end = change or nn.Identity(), end or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.end(self.body(self.change(x)).mean(dim=(2, 3))))
        return y


# ---- the batch -------------------------------------------------------------------------------------------------------


class MinMax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.min()) / (x.max() - x.min())


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class FirstRow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x[:1].mean()


class OneImage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(1, 3, x.shape[2], x.shape[3])


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x).reshape(-1)
        return y


ONE_AT_A_TIME: dict[str, Callable[[], nn.Module]] = {
    "batch statistics": lambda: Classifier(nn.BatchNorm2d(3, track_running_stats=False)),
    "min-max": lambda: Classifier(MinMax()),
    "mean of the batch": lambda: Classifier(end=Centred()),
    "first row": lambda: Classifier(FirstRow()),
    "one image": lambda: Classifier(OneImage()),
    "no batch dimension": Squeezed,
}


@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_networks_that_depend_on_the_batch_run_one_image_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(ONE_AT_A_TIME[name], monkeypatch)
    assert model.one_row
    assert any("batch size 1" in sentence for sentence in model.warnings)
    monkeypatch.setattr(warmup, "MEASURE_S", 0)
    warmup.warm_up(model, 8)
    assert set(model.batch_sizes.values()) == {1}


def test_requests_cannot_name_a_larger_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(ONE_AT_A_TIME["min-max"], monkeypatch)
    image = pb.Image(pixels=pb.Pixels(height=16, width=16, data=bytes(3 * 16 * 16)))
    request = pb.ExplainRequest(image=image, method=pb.MethodSpec(name="grad-cam"), batch_sizes={"forward": 8})
    assert parse_explain(request, model, Config()).batch_sizes == {"forward": 1}
    assert loaded_message(model).warnings == list(model.warnings)


def test_configured_batch_size_must_be_1_for_such_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"models\.m\.batch_size: .* set batch_size = 1"):
        load_model(ONE_AT_A_TIME["min-max"], monkeypatch, batch_size=4)
    assert load_model(ONE_AT_A_TIME["min-max"], monkeypatch, batch_size=1).one_row


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_scale_of_the_logits_does_not_matter(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(change: nn.Module) -> nn.Module:
        net = Classifier(change)
        net.fc.requires_grad_(False).weight.mul_(scale)
        net.fc.bias.mul_(scale)
        return net

    assert not load_model(lambda: scaled(nn.Identity()), monkeypatch).one_row
    assert load_model(lambda: scaled(MinMax()), monkeypatch).one_row


# ---- chance ----------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: Classifier(Noisy(F.dropout)),
    "dropout of channels": lambda: Classifier(Noisy(F.dropout2d)),
    "noise": lambda: Classifier(Noisy(lambda x: x + 0.01 * torch.randn_like(x))),
    "random": lambda: Classifier(Noisy(lambda x: x * random.random())),
    "numpy": lambda: Classifier(Noisy(lambda x: x * float(np.random.rand()))),
    "state": lambda: Classifier(Counting()),
}


@pytest.mark.parametrize("name", RANDOM)
def test_outputs_that_change_from_call_to_call_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"models\.m\.source: the network returns another output at each call"):
        load_model(RANDOM[name], monkeypatch)


def test_network_without_finite_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"models\.m\.source: the network returns NaN"):
        load_model(lambda: Classifier(Noisy(lambda x: x * float("nan"))), monkeypatch)


def test_random_numbers_without_effect_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(lambda: Classifier(Noisy(lambda x: x + 0 * torch.rand(()))), monkeypatch)
    assert not model.one_row
    assert not model.warnings


def test_usual_networks_have_no_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    with capture_logs() as lines:
        for network in (Classifier, tiny_cnn):
            model = load_model(network, monkeypatch)
            assert not model.one_row
            assert model.channels_last
            assert model.head == "softmax"
            assert not model.warnings
    assert not [line for line in lines if line["log_level"] == "warning"]


# ---- memory formats --------------------------------------------------------------------------------------------------


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.fc = nn.Linear(8 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        A = self.body(x)
        y: Tensor = self.fc(A.view(len(A), -1))
        return y


class ViewingRows(nn.Module):
    """Network whose view fails for several rows only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        A = self.conv(x)
        rows = A.view(len(A) * 8, 14, 14)
        y: Tensor = self.fc(rows.mean(dim=(1, 2)).view(-1, 8))
        return y


class ThreeInTwo(nn.Module):
    """Network of 2-D images with a 3-D convolution over channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.deep, self.fc = nn.Conv2d(3, 8, 3), nn.Conv3d(1, 2, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        A = self.deep(self.conv(x).unsqueeze(1)).flatten(1, 2)
        y: Tensor = self.fc(A.mean(dim=(2, 3)))
        return y


@pytest.mark.parametrize("network", [Viewing, ViewingRows])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_views_of_convolutions_run_in_the_contiguous_format(
    network: Callable[[], nn.Module], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(network, monkeypatch)
    assert not model.channels_last
    assert not model.one_row
    monkeypatch.setattr(warmup, "SHORT_MEASURE_S", 0)
    warmup.warm_up(model, batch_size)
    assert not model.unavailable
    assert torch.allclose(model.module(X), network().eval()(X), atol=1e-5)


def test_convolution_of_three_dimensions_inside_a_network_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(ThreeInTwo, monkeypatch)
    assert model.channels_last
    assert model.classes == 3


# ---- features --------------------------------------------------------------------------------------------------------


class Timm(nn.Sequential):
    num_classes = 0


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier(classes=16)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x))


def body() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]


FEATURES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "num_classes": (lambda: Timm(*body()), "num_classes is 0"),
    "identity": (lambda: nn.Sequential(*body(), nn.Identity()), "is an Identity in the place of a classifier"),
    "pooled": (lambda: nn.Sequential(*body()), "the last module with weights is 1, a BatchNorm2d"),
    "pooled maps": (lambda: nn.Sequential(*body()[:-1]), "the last module with weights is 1, a BatchNorm2d"),
    "normalised": (lambda: nn.Sequential(*body(), nn.LayerNorm(8)), "the last module with weights is 5, a LayerNorm"),
    "embedding": (Normalised, "vectors of length 1"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_networks_without_a_classifier_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, reason = FEATURES[name]
    with pytest.raises(ConfigError, match=rf"models\.m\.source: the network has no classifier: .*{reason}.* classes"):
        load_model(network, monkeypatch)


def test_classes_key_confirms_that_the_outputs_are_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    network = FEATURES["pooled"][0]
    assert load_model(network, monkeypatch, classes=8).classes == 8
    with pytest.raises(ConfigError, match=r"models\.m\.classes: the network has 8 classes, not 9"):
        load_model(network, monkeypatch, classes=9)


class Cosine(nn.Module):
    """Classifier whose weights belong to the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*body())
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x)) @ F.normalize(self.weight).T


@pytest.mark.parametrize(
    "network",
    [
        lambda: nn.Sequential(*body(), nn.Linear(8, 4), nn.Identity()),
        lambda: nn.Sequential(*body(), nn.Linear(8, 4), nn.BatchNorm1d(4)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        Cosine,
    ],
)
def test_unusual_classifiers_are_accepted(network: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(network, monkeypatch).classes == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "convnext_tiny", "vit_b_32", "efficientnet_b0"])
def test_backbones_of_torchvision_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def backbone() -> nn.Module:
        torch.manual_seed(0)
        net: Any = torchvision.models.get_model(name, weights=None, **({"image_size": 64} if "vit" in name else {}))
        if name == "convnext_tiny":
            net.classifier[2] = nn.Identity()
        else:
            setattr(net, next(each for each in ("fc", "classifier", "heads") if hasattr(net, each)), nn.Identity())
        module: nn.Module = net
        return module

    with pytest.raises(ConfigError, match="has no classifier"):
        load_model(backbone, monkeypatch, input_size=(64, 64))


# ---- digest ----------------------------------------------------------------------------------------------------------


def test_digest_is_that_of_the_network_as_it_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def softmaxed() -> nn.Module:
        return nn.Sequential(Classifier(), nn.Softmax(dim=1))

    assert load_model(softmaxed, monkeypatch).digest == state_digest(softmaxed())


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.rand_like(x)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_random_numbers_are_noticed_on_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU has a random generator of its own."""
    monkeypatch.setitem(globals(), "made", lambda: Classifier(Noise()))
    config = ModelConfig(name="m", source=f"{HERE}:made", input_size=(16, 16))
    for number in range(2):
        with pytest.raises(ConfigError, match="it draws random numbers"):
            load(config, torch.device("cuda", number))


# ---- lack of memory --------------------------------------------------------------------------------------------------


class RunsOut(nn.Module):
    """Identity that finds no memory at one of its calls, counted over all copies of the network."""

    calls = 0
    fails_at = 0

    def forward(self, x: Tensor) -> Tensor:
        RunsOut.calls += 1
        if RunsOut.calls == RunsOut.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x + 0


def test_lack_of_memory_is_no_fault_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of the passes during a load."""

    def loaded(fails_at: int) -> Model | None:
        monkeypatch.setattr(RunsOut, "calls", 0)
        monkeypatch.setattr(RunsOut, "fails_at", fails_at)
        try:
            return load_model(lambda: Classifier(RunsOut()), monkeypatch, precision=("fp32", "fp16"))
        except torch.OutOfMemoryError:
            return None

    expected = loaded(fails_at=0)
    assert expected is not None
    passes = RunsOut.calls
    assert passes > 5
    models = [loaded(number) for number in range(1, passes + 1)]
    assert models[0] is None
    for model in filter(None, models):  # the measurement of default layers can go on with single images
        assert (model.one_row, model.warnings, model.channels_last) == (False, (), expected.channels_last)
        assert [each.name for each in model.layers] == [each.name for each in expected.layers]
