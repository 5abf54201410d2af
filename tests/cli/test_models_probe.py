"""`camserve models probe`: what a server would serve for a model source."""

from __future__ import annotations

import re
from pathlib import Path

import PIL.Image
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from camserve_cli.app import app
from camserve_server import model_probe
from camserve_server.config import ModelConfig
from camserve_server.model_probe import (
    STEPS,
    difference_to_original,
    example_image,
    input_of,
    original_network,
    probe_source,
)
from camserve_server.models.load import load
from tests import nets
from tests.processes import CAMSERVE, completed

pytestmark = pytest.mark.slow


def probability_net() -> nn.Module:
    return nn.Sequential(nets.tiny_cnn(), nn.Softmax(dim=1))


def random_net() -> nn.Module:
    return nets.tiny_cnn(seed=int(torch.randint(1000, (1,))))


class TwoNets(nn.Module):
    """Network in which the layers of `b` are in a branch that does not reach the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nets.tiny_cnn(0), nets.tiny_cnn(1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.a(x) + 0 * self.b(x)
        return logits


@pytest.fixture
def own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the configuration of the log in this process."""
    monkeypatch.setattr(model_probe, "log_to_stderr", lambda _: None)


def test_report_shows_layers_methods_and_agreement(tmp_path: Path) -> None:
    out = tmp_path / "new" / "layers.png"
    source = "python:tests.nets:tiny_cnn"
    done = completed([*CAMSERVE, "models", "probe", source, "--key", "input_size=[32,32]", "--out", str(out)])
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\S+) +(\d.*?) *$", done.stdout, re.MULTILINE))
    assert re.fullmatch(r"20 +8 × 8 +one, several +0.00", rows["r3"])
    assert re.fullmatch(r"16 +16 × 16 +yes +0.00", rows["c2"])
    assert re.search(r"^classes +7, softmax *$", done.stdout, re.MULTILINE)
    share = re.search(r"^largest difference of outputs +(\S+) of the .*\(logits\) *$", done.stdout, re.MULTILINE)
    assert share
    assert float(share[1]) < 1e-5
    assert re.search(r"^methods +.*\bgrad-cam\b", done.stdout, re.MULTILINE)
    assert "attention-rollout, raw-attention: it does not have global self-attention" in done.stdout
    with PIL.Image.open(out) as picture:
        assert picture.width > 6 * 160, "a row of maps"


def test_side_branch_is_shown(tmp_path: Path) -> None:
    source = "python:tests.cli.test_models_probe:TwoNets"
    options = ["--key", "input_size=[32,32]", "--key", "layer=b.r3", "--out", str(tmp_path / "layers.png")]
    done = completed([*CAMSERVE, "models", "probe", source, *options])
    assert done.returncode == 0, done.stderr
    assert (
        "warning: only a part of the information in the logits passes through the configured layer b.r3" in done.stderr
    )
    assert re.search(r"^b\.r3 +20 +8 × 8 +one +1\.00 *$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("torchvision:resnet51", [], "source: torchvision has no classifier 'resnet51'"),
        ("torchvision:resnet18", [], "weights: give a file or a torchvision name"),
        ("tf:resnet50", [], "source: String should match pattern"),
        ("python:tests.nets:tiny_cnn", ["--key", "color=1"], "color: Extra inputs are not permitted"),
        ("python:tests.nets:tiny_cnn", ["--image", "missing.jpg"], "image: missing.jpg: No such file"),
        ("python:tests.nets:tiny_cnn", ["--image", "{text}"], "the image cannot be read"),
    ],
)
@pytest.mark.usefixtures("own_log")
def test_refused_source_is_an_error(source: str, options: list[str], message: str, tmp_path: Path) -> None:
    text, out = tmp_path / "text.jpg", tmp_path / "layers.png"
    text.write_text("no image", encoding="utf-8")
    options = [each.format(text=text) for each in options]
    done = CliRunner().invoke(app, ["models", "probe", source, "--out", str(out), *options])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert not out.exists()


class FailsAgain(nn.Module):
    """Network that fails if this process has built two, as for the comparison with the original network."""

    built = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()
        type(self).built += 1
        self.number = type(self).built

    def forward(self, x: Tensor) -> Tensor:
        if self.number > 1:
            raise RuntimeError("the second network\ndoes not work")
        logits: Tensor = self.net(x)
        return logits


class FailsInWarmUp(nn.Module):
    """Network that fails if all pixels are zero, as in the warm-up."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        self.net.forward(x)
        if not x.any():
            raise KeyError("zero")
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.usefixtures("own_log")
@pytest.mark.parametrize(
    ("factory", "message"), [("FailsAgain", "RuntimeError: the second network"), ("FailsInWarmUp", "KeyError: 'zero'")]
)
def test_failing_code_of_a_network_is_one_sentence(factory: str, message: str) -> None:
    FailsAgain.built = 0
    source = f"python:tests.cli.test_models_probe:{factory}"
    with pytest.raises(ValueError, match=r"^source: the network failed while it was examined: ") as caught:
        probe_source(source, {"input_size": [32, 32]}, None)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def dropout_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Dropout(),
        nn.ReLU(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


@pytest.mark.usefixtures("own_log")
def test_equal_outputs_are_shown_once_and_steps_are_reported() -> None:
    steps: list[str] = []
    keys = {"input_size": [32, 32], "layer": "3"}
    report = probe_source("python:tests.cli.test_models_probe:dropout_net", keys, None, steps.append)
    assert len(steps) == len({*steps}) == STEPS
    layers = {each.layer.name: each for each in report.layers}
    assert [*layers] == ["0", "1", "2", "3"]
    assert [name for name, each in layers.items() if each.map is not None] == ["0", "3"], "3 is the default layer"


def test_difference_of_outputs_is_measured() -> None:
    def difference(factory: str, change: float = 0) -> tuple[str, float]:
        config = ModelConfig(name="m", source=f"python:tests.cli.test_models_probe:{factory}", input_size=(32, 32))
        model = load(config, torch.device("cpu"))
        original = original_network(config, model)
        assert original is not None
        with torch.no_grad():
            names = [name for name, _ in model.module.named_parameters() if name.endswith("fc.bias")]
            model.module.get_parameter(names[0]).add_(change)
        return difference_to_original(model, original, input_of(model, example_image()))

    kind, share = difference("TwoNets")
    assert kind == "logits"
    assert share < 1e-5
    kind, share = difference("probability_net")
    assert kind == "probabilities"
    assert share < 1e-5
    assert difference("TwoNets", change=1)[1] > 0.1


def test_factory_with_random_weights_has_no_agreement() -> None:
    config = ModelConfig(name="m", source="python:tests.cli.test_models_probe:random_net", input_size=(32, 32))
    torch.manual_seed(0)
    assert original_network(config, load(config, torch.device("cpu"))) is None
