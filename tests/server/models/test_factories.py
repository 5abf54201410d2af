"""Networks from Python factories: shared objects, compiled modules, and code that changes on disk."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError
from camserve_server.models.factories import check_code
from camserve_server.models.load import load, state_digest
from camserve_server.models.model import Model
from tests.support import noise

HERE = "python:tests.server.models.test_factories"


def load_model(factory: str, **keys: Any) -> Model:
    return load(ModelConfig(name="m", source=f"{HERE}:{factory}", input_size=(16, 16), **keys), torch.device("cpu"))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    )


SHARED = network()
X = noise(1, 3, 16, 16)


def shared() -> nn.Module:
    return SHARED


def test_models_of_one_object_do_not_interfere() -> None:
    before = SHARED.eval()(X)
    first = load_model("shared")
    second = load_model("shared", fold_batch_norm=False, precision="fp64")
    assert first.digest == second.digest == state_digest(network())
    assert first.folded and not second.folded
    assert second.module(X.double()).dtype == torch.float64
    assert torch.equal(SHARED(X), before)
    assert next(SHARED.parameters()).requires_grad


def weight_normed() -> nn.Module:
    net = network()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(net[0])
    return net


def test_tensors_with_a_history_are_copied() -> None:
    assert load_model("weight_normed").classes == 3


class Locked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*network())
        self.lock = threading.Lock()


LOCKED = Locked()


def locked() -> nn.Module:
    return LOCKED


def new_locked() -> nn.Module:
    return Locked()


def test_object_that_cannot_be_copied_is_served_once() -> None:
    assert load_model("locked").classes == 3
    with pytest.raises(ConfigError, match=r"models\.m\.source: .* returns the same network each time"):
        load_model("locked")
    load_model("new_locked")
    load_model("new_locked")


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compiled() -> nn.Module:
    module: nn.Module = compiled_module(network())
    return module


def compiled_in_place() -> nn.Module:
    net = network()
    net[0].compile(backend="eager")
    net.compile(backend="eager")
    return net


def compiled_inside() -> nn.Module:
    net, inner = network(), nn.Sequential()
    inner.add_module("0", compiled_module(net[0]))
    net.add_module("0", compiled_module(inner))
    return net


def compiled_module(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled_method() -> nn.Module:
    net: Any = network()
    net.forward = torch.compile(net.forward, backend="eager")
    module: nn.Module = net
    return module


def decorated() -> nn.Module:
    class Decorated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        @torch.compile(backend="eager")
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

    return Decorated()


@pytest.mark.slow  # each test imports or starts torch.compile
@pytest.mark.parametrize("factory", [compiled, compiled_in_place, compiled_inside, compiled_method, decorated])
def test_compiled_modules_are_unwrapped(factory: Callable[[], nn.Module]) -> None:
    model = load_model(factory.__name__, fold_batch_norm=False)
    assert model.layer is not None
    assert len(model.layers) == 1
    assert not any("_orig_mod" in name for name, _ in model.module.named_modules())
    assert torch.allclose(model.module(X), network().eval()(X), atol=1e-5)
    seen: list[Tensor] = []
    module = model.module.get_submodule(model.layer.module)
    module.register_forward_hook(lambda module, args, output: seen.append(output))
    model.module(X)
    assert len(seen) == 1


# ---- code ------------------------------------------------------------------------------------------------------------

CODE = "import torch\nfrom factory_blocks import block\ndef make():\n    return block()\n"
BLOCK = "from torch import nn\ndef block():\n    return nn.Sequential(nn.Conv2d(3, 2, 16), nn.Flatten())\n"


def test_changed_code_needs_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "factory_nets.py").write_text(CODE, encoding="utf-8")
    blocks = tmp_path / "factory_blocks.py"
    blocks.write_text(BLOCK, encoding="utf-8")
    config = ModelConfig(name="m", source="python:factory_nets:make", input_size=(16, 16))
    load(config, torch.device("cpu"))
    check_code(config)
    blocks.write_text(blocks.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"models\.m\.source: .*factory_blocks\.py changed .* restart the server"):
        check_code(config)
    check_code(ModelConfig(name="m", source=f"{HERE}:shared"))


@pytest.mark.slow  # a process imports torchvision
def test_factory_may_import_torchvision(tmp_path: Path) -> None:
    """The factory is the first to import torchvision in its process."""
    (tmp_path / "nets.py").write_text(
        "import torchvision\ndef make():\n    return torchvision.models.squeezenet1_1(num_classes=2)\n",
        encoding="utf-8",
    )
    code = (
        "import torch\nfrom camserve_server.config import ModelConfig\n"
        "from camserve_server.models.sources import build_network\n"
        "print(type(build_network(ModelConfig(name='m', source='python:nets:make'), 'models.m')).__name__)"
    )
    command, env = [sys.executable, "-c", code], {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "SqueezeNet", run.stderr
