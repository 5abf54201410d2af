"""Networks that end in softmax or sigmoid, and networks with one output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError
from camserve_server.models.load import load
from camserve_server.models.model import Model
from tests.support import as_model, call, explained, noise

HERE = "python:tests.server.models.test_heads"
X = noise(1, 3, 16, 16)


def load_model(network: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, **keys: Any) -> Model:
    monkeypatch.setitem(globals(), "made", network)
    return load(ModelConfig(name="m", source=f"{HERE}:made", **{"input_size": (16, 16), **keys}), torch.device("cpu"))


def plain(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    head = nn.Linear(8, classes).requires_grad_(False)
    head.weight.mul_(5)
    head.bias.zero_()
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class Ending(nn.Module):
    """The plain network with a function at its end."""

    def __init__(self, end: Callable[[Tensor], Tensor], classes: int = 3) -> None:
        super().__init__()
        self.net, self.end = plain(classes), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.net(x))


class Attending(nn.Module):
    """Network with further calls of softmax and sigmoid, some through the module at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.softmax = plain(), nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * x.mean(dim=(2, 3), keepdim=True).sigmoid() * self.softmax(x)
        y: Tensor = self.softmax(self.net(x))
        return y


class Ensemble(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.end = plain(), plain(), end
        for weight in self.b[4].parameters():
            nn.init.normal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.end(self.a(x)) + self.end(self.b(x))) / 2


REMOVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nn.Softmax": (lambda: plain().append(nn.Softmax(dim=1)), "softmax"),
    "nn.Softmax on maps": (
        lambda: nn.Sequential(plain(), nn.Unflatten(1, (3, 1, 1)), nn.Softmax(dim=1), nn.Flatten()),
        "softmax",
    ),
    "nn.Softmax in a tuple": (lambda: Ending(lambda y: (y, y.softmax(-1)[None])[0].softmax(-1)), "softmax"),
    "F.softmax": (lambda: Ending(lambda y: F.softmax(y, dim=1)), "softmax"),
    "torch.softmax": (lambda: Ending(lambda y: torch.softmax(y, dim=-1)), "softmax"),
    "method": (lambda: Ending(lambda y: y.softmax(dim=1)), "softmax"),
    "used before": (Attending, "softmax"),
    "nn.Sigmoid": (lambda: plain().append(nn.Sigmoid()), "sigmoid"),
    "torch.sigmoid": (lambda: Ending(torch.sigmoid), "sigmoid"),
    "sigmoid in place": (lambda: Ending(lambda y: y.sigmoid_()), "sigmoid"),
}


def logits_of(probabilities: Tensor, head: str) -> Tensor:
    p = probabilities.double()
    return p.logit() if head == "sigmoid" else p.log() - p.log().mean(dim=1, keepdim=True)


@pytest.mark.parametrize("name", REMOVED)
def test_final_function_is_removed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, head = REMOVED[name]
    model = load_model(network, monkeypatch)
    p = network().eval()(X)
    assert model.head == head
    assert any(f"ends in a {head}" in sentence and "set head" in sentence for sentence in model.warnings)
    y = model.module(X)
    assert torch.allclose(model.probabilities(y), p.double(), atol=1e-6)
    y = y if head == "sigmoid" else y - y.mean(dim=1, keepdim=True)
    assert torch.allclose(y.double(), logits_of(p, head), atol=1e-4)
    confirmed = load_model(network, monkeypatch, head=head)
    assert not confirmed.warnings
    assert torch.equal(confirmed.module(X), model.module(X))


def test_copies_have_no_final_function_either(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(REMOVED["F.softmax"][0], monkeypatch, precision=["fp32", "bf16"])
    y, other = model.module(X), model.at("bf16").module(X.bfloat16()).float()
    assert torch.allclose(y, other, atol=0.1)
    assert float(y.min()) < 0


def test_methods_explain_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(lambda: plain().append(nn.Softmax(dim=1)), monkeypatch)
    assert model.gap is not None
    expected = explained(as_model(plain(), (16, 16)), X[0], call(as_model(plain(), (16, 16)), "grad-cam", ["1"])).maps
    model.batch_sizes.update({"forward": 4, "gradient": 4, "ascend": 4})
    assert torch.allclose(explained(model, X[0], call(model, "grad-cam", ["1"])).maps, expected)


def checked_softmax(y: Tensor) -> Tensor:
    """Return the softmax, and fail if it does not sum to 1, as if its call is skipped."""
    p = y.softmax(1)
    if not torch.allclose(p.sum(dim=1), torch.ones(len(p))):
        raise ValueError("no probabilities")
    return p


def test_nothing_is_left_of_a_removal_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(lambda: Ending(checked_softmax), monkeypatch)
    assert model.head == "probabilities"
    assert not {"forward", "_camserve_final_call"} & vars(model.module).keys()


@pytest.mark.parametrize(
    ("network", "head"),
    [
        (lambda: Ensemble(lambda y: y.softmax(1)), "probabilities"),
        (lambda: Ensemble(torch.sigmoid), "probabilities"),
        (lambda: Ending(lambda y: y.exp() / y.exp().sum(1, keepdim=True)), "probabilities"),
        (lambda: Ending(lambda y: torch.sigmoid(y) * 0.8 + 0.1), "probabilities"),
        (lambda: Ending(lambda y: y.tanh() / 2 + 0.5), "probabilities"),
        (lambda: Ending(F.hardsigmoid), "probabilities"),
        (lambda: Ending(lambda y: torch.cat([y[:, :1].sigmoid(), y[:, 1:].sigmoid()], 1)), "probabilities"),
        (lambda: Ending(lambda y: y.relu() / 50), "softmax"),
        (lambda: Ending(lambda y: y.log_softmax(1)), "softmax"),
    ],
    ids=[
        "mean of softmax",
        "mean of sigmoid",
        "written out",
        "calibrated",
        "tanh",
        "hard sigmoid",
        "two heads",
        "relu",
        "log softmax",
    ],
)
def test_probabilities_that_cannot_be_undone(
    network: Callable[[], nn.Module], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(network, monkeypatch)
    p = network().eval()(X)
    assert model.head == head
    if head == "probabilities":
        assert torch.allclose(model.probabilities(model.module(X)), p.double(), atol=1e-6)
        warnings = load_model(network, monkeypatch, head="probabilities").warnings
        assert not [each for each in warnings if "probabilities" in each]
    if head == "probabilities":
        assert any('head = "probabilities"' in sentence for sentence in model.warnings)
    else:
        expected = p.double().softmax(1)
        assert torch.allclose(model.probabilities(model.module(X)), expected, atol=1e-6)
        assert not model.warnings


@pytest.mark.parametrize(
    ("network", "head", "message"),
    [
        (REMOVED["nn.Softmax"][0], "sigmoid", 'the network ends in a softmax, but head is "sigmoid"'),
        (REMOVED["torch.sigmoid"][0], "softmax", 'the network ends in a sigmoid, but head is "softmax"'),
        (lambda: Ensemble(lambda y: y.softmax(1)), "softmax", "its outputs sum to 1"),
        (plain, "probabilities", "which are not probabilities"),
    ],
)
def test_head_that_contradicts_the_network_is_refused(
    network: Callable[[], nn.Module], head: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=rf"models\.m\.head: .*{message}"):
        load_model(network, monkeypatch, head=head)


def test_sigmoid_inside_torchscript_is_recognised_by_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    net = plain(1).append(nn.Sigmoid()).eval()
    with pytest.warns(DeprecationWarning):
        script = torch.jit.script(net)
    model = load_model(lambda: script, monkeypatch)
    assert model.head == "probabilities"
    assert torch.allclose(model.probabilities(model.module(X))[:, :1].float(), net(X), atol=1e-6)
    assert any("lie in [0, 1] for all images" in sentence for sentence in model.warnings)


def test_probabilities_can_be_explained_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    network = REMOVED["nn.Softmax"][0]
    model = load_model(network, monkeypatch, head="probabilities")
    assert torch.allclose(model.module(X), network().eval()(X), atol=1e-6)
    assert not model.warnings


# ---- one output ------------------------------------------------------------------------------------------------------


def one_logit() -> nn.Module:
    net = plain(1)
    net.get_parameter("4.bias").sub_(3)
    return net


@pytest.mark.parametrize(
    ("network", "head"),
    [
        (one_logit, None),
        (one_logit, "sigmoid"),
        (lambda: nn.Sequential(one_logit(), nn.Sigmoid()), None),
        (lambda: nn.Sequential(one_logit(), nn.Flatten(0)), None),
        (lambda: nn.Sequential(one_logit(), nn.Sigmoid()), "probabilities"),
    ],
    ids=["logit", "configured", "sigmoid", "flat", "probabilities"],
)
def test_one_output_gives_two_classes(
    network: Callable[[], nn.Module], head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(network, monkeypatch, head=head)
    assert model.classes == 2
    assert model.labels == ("positive", "negative")
    y = one_logit().eval()(X)
    out = model.module(X)
    expected = torch.cat([y, -y], 1) if head != "probabilities" else torch.cat([y.sigmoid(), (-y).sigmoid()], 1)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(model.probabilities(out), torch.cat([y, -y], 1).double().sigmoid(), atol=1e-6)
    assert model.label(int(model.probabilities(out).argmax())) == "negative"


@pytest.mark.parametrize(
    ("text", "labels"), [("cat\ndog\n", ("cat", "dog")), ("pneumonia", ("pneumonia", "not pneumonia"))]
)
def test_labels_of_one_output(
    text: str, labels: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "labels.txt").write_text(text, encoding="utf-8")
    assert load_model(one_logit, monkeypatch, labels=str(tmp_path / "labels.txt")).labels == labels
    (tmp_path / "labels.txt").write_text("a\nb\nc", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"3 labels for 2 classes; .* first that of the positive class"):
        load_model(one_logit, monkeypatch, labels=str(tmp_path / "labels.txt"))


@pytest.mark.parametrize("method", ["cam", "grad-cam", "layer-cam", "score-cam", "input-x-gradient"])
def test_positive_class_has_the_map_of_the_logit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of earlier versions name class 0, whose logit was the only one."""
    model, before = load_model(one_logit, monkeypatch), as_model(one_logit(), (16, 16), head="sigmoid")
    model.batch_sizes.update(before.batch_sizes)
    layers = [] if method == "input-x-gradient" else ["1"]
    then = explained(before, X[0], call(before, method, layers), targets=(0,))
    assert torch.equal(explained(model, X[0], call(model, method, layers), targets=(0,)).maps, then.maps)
    now = explained(model, X[0], call(model, method, layers), targets=(0, 1))
    assert torch.allclose(now.maps[0], then.maps[0], atol=1e-5)
    assert torch.equal(now.targets.y, torch.cat([then.targets.y, -then.targets.y]))
    if method == "cam":
        assert not torch.equal(now.maps[1], now.maps[0])
