"""Networks that cannot run backward passes, or that hide their modules: other methods are served."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from camserve_server import registry
from camserve_server.config import ModelConfig
from camserve_server.engine import warmup
from camserve_server.errors import ConfigError, Unservable
from camserve_server.models.load import load, state_digest
from camserve_server.models.model import Model
from camserve_server.models.servable import unsupported_reason
from camserve_server.service.responses import loaded_message
from tests.support import call, explained, noise

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of old functions that users' networks contain
HERE = "python:tests.server.models.test_unavailable"
X = noise(1, 3, 16, 16)
FORWARD = {"rise", "occlusion", "fake-cam", "random", "center-gaussian"}


def load_model(network: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, **keys: Any) -> Model:
    monkeypatch.setitem(globals(), "made", network)
    monkeypatch.setattr(warmup, "MEASURE_S", 0)
    monkeypatch.setattr(warmup, "SHORT_MEASURE_S", 0)
    config = ModelConfig(name="m", source=f"{HERE}:made", **{"input_size": (16, 16), **keys})
    model = load(config, torch.device("cpu"))
    warmup.warm_up(model, 2)
    return model


def served(model: Model) -> set[str]:
    return set(loaded_message(model).methods)


def plain() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )


class Around(nn.Module):
    """The plain network, with a function around the run of its body or of the whole."""

    def __init__(self, body: Any = None, whole: Any = None) -> None:
        super().__init__()
        net = plain()
        self.body, self.head = net[:4], net[4:]
        self.around_body, self.around_whole = body or (lambda f, x: f(x)), whole or (lambda f, x: f(x))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.around_whole(lambda x: self.head(self.around_body(self.body, x)), x)
        return y


def inference(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return f(x)


def reentrant(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y: Tensor = checkpoint(f, x, use_reentrant=True)
    return y


def not_reentrant(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y: Tensor = checkpoint(f, x, use_reentrant=False)
    return y


def numpy_body(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.from_numpy(f(x).detach().numpy().copy())


class Hooked(nn.Module):
    """Network of a Grad-CAM tutorial, which keeps the gradient of its last activation."""

    def __init__(self) -> None:
        super().__init__()
        net = plain()
        self.features, self.head = net[:4], net[4:]
        self.gradients: Tensor | None = None

    def keep(self, gradient: Tensor) -> None:
        self.gradients = gradient

    def forward(self, x: Tensor) -> Tensor:
        A = self.features(x)
        A.register_hook(self.keep)
        y: Tensor = self.head(A)
        return y


class Extra(nn.Sequential):
    """Network with state that is not a tensor."""

    def __init__(self) -> None:
        super().__init__(*plain())
        self.scale = {"scale": torch.tensor(2.0), "steps": 3, "names": ["a", None]}

    def get_extra_state(self) -> Any:
        return self.scale

    def set_extra_state(self, state: Any) -> None:
        self.scale = state


def full_backward_hook() -> nn.Module:
    net = plain()
    net[2].register_full_backward_hook(lambda module, grads, outputs: None)
    return net


def traced() -> Any:
    trace: Any = torch.jit.trace
    return trace(plain().eval(), X)


def scripted() -> Any:
    return torch.jit.script(plain().eval())


def frozen_script() -> Any:
    return torch.jit.freeze(torch.jit.script(plain().eval()))


def exported() -> Any:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(plain().eval(), (X.repeat(2, 1, 1, 1),), dynamic_shapes=({0: batch},))


def exported_for_one_image() -> Any:
    return torch.export.export(plain().eval(), (X,)).module()


def quantised() -> nn.Module:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    net: nn.Module = quantize(plain(), {nn.Linear})
    return net


NETWORKS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "inference mode": (lambda: Around(whole=inference), {"gradient", "ascend"}),
    "body in inference mode": (lambda: Around(body=inference), {"ascend"}),
    "reentrant checkpoint": (lambda: Around(body=reentrant), {"gradient", "ascend"}),
    "checkpoint": (lambda: Around(body=not_reentrant), set()),
    "numpy": (lambda: Around(body=numpy_body), {"gradient", "ascend"}),
    "hook on a gradient": (Hooked, set()),
    "backward hook": (full_backward_hook, set()),
    "extra state": (Extra, set()),
    "traced": (traced, set()),
    "scripted": (scripted, set()),
    "frozen script": (frozen_script, set()),
    "exported": (exported, set()),
    "exported for one image": (exported_for_one_image, set()),
    "quantised head": (quantised, {"gradient", "ascend"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_methods_that_the_network_can_run_are_served(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, unavailable = NETWORKS[name]
    with capture_logs() as lines:
        model = load_model(network, monkeypatch)
    assert set(model.unavailable) >= unavailable
    logged = [line for line in lines if line["event"] == "a kind of lane cannot be served"]
    assert {line["lane"]: line["reason"] for line in logged} == model.unavailable
    assert dict(loaded_message(model).unavailable) == model.unavailable
    assert torch.allclose(model.module(X).detach(), plain().eval()(X), atol=0.05)
    names = served(model)
    assert names >= FORWARD
    for each in sorted(registry.METHODS):
        if each in names:
            few: dict[str, Any] = FEW.get(each, {})
            try:
                assert torch.isfinite(explained(model, X[0], call(model, each, **few)).maps).all(), each
            except Unservable as error:  # the layer is inside the checkpoint
                assert name == "checkpoint" and "CheckpointError" in error.message
        else:
            assert unsupported_reason(registry.METHODS[each], model)


FEW: dict[str, dict[str, object]] = {
    "rise": {"masks": 4},
    "opti-cam": {"steps": 2},
    "smooth-grad": {"samples": 2},
    "smooth-grad-cam++": {"samples": 2},
    "integrated-gradients": {"steps": 2},
    "gradient-shap": {"samples": 2},
    "ss-cam": {"samples": 1},
    "is-cam": {"steps": 1},
}


def test_refusal_of_a_named_layer_has_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(NETWORKS["reentrant checkpoint"][0], monkeypatch)
    with pytest.raises(
        Unservable, match=r"has no gradient passes for the requested layers|reaches the requested layer"
    ):
        explained(model, X[0], call(model, "grad-cam", ["body.0"]))


def test_digest_contains_state_that_is_not_a_tensor() -> None:
    digest = state_digest(Extra())
    assert digest == state_digest(Extra())
    other = Extra()
    other.scale["steps"] = 4
    assert digest != state_digest(other)
    other.scale["steps"], other.scale["scale"] = 3, torch.tensor(2.5)
    assert digest != state_digest(other)


def test_gradients_of_a_network_with_hooks_are_those_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = load_model(Hooked, monkeypatch), load_model(Around, monkeypatch)
    maps = explained(model, X[0], call(model, "grad-cam", ["features"])).maps
    assert torch.allclose(maps, explained(other, X[0], call(other, "grad-cam", ["body"])).maps, atol=1e-5)


def test_declared_passes_are_those_of_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each method without gradients runs on a network that has none."""
    names = {name for name, method in registry.METHODS.items() if method.passes != "forward"}
    assert names == {
        *("grad-cam", "grad-cam++", "gradient-shap", "hires-cam", "input-x-gradient", "integrated-gradients"),
        *("layer-cam", "opti-cam", "smooth-grad", "smooth-grad-cam++", "xgrad-cam", "zoom-cam"),
    }
    model = load_model(lambda: Around(whole=inference), monkeypatch)
    assert not served(model) & names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("timm:test_vit", ""),
        ("timm:test_resnet", "it does not have global self-attention and a class token"),
        ("timm:swin_tiny_patch4_window7_224", r"its attention \(WindowAttention\) is not supported; it needs global"),
    ],
)
def test_reason_tells_missing_attention_from_unsupported_attention(source: str, reason: str) -> None:
    config = ModelConfig(name="m", source=source, allow_random_weights=True)
    model = load(config, torch.device("cpu"))
    assert re.match(reason or "^$", unsupported_reason(registry.METHODS["attention-rollout"], model))


def failing() -> nn.Module:
    raise AssertionError


def test_failure_of_a_factory_names_the_exception_and_a_remedy() -> None:
    config = ModelConfig(name="m", source=f"{HERE}:failing")
    with pytest.raises(ConfigError, match=r"models\.m\.source: .*:failing failed: AssertionError; correct the source"):
        load(config, torch.device("cpu"))
