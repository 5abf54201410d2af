"""Forward passes in OpenVINO: maps, the conditions of their use, and the privacy of the conversion."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from camserve_server.config import Config, ModelConfig
from camserve_server.engine.lanes import fast_forward
from camserve_server.engine.lanes.openvino_forward import OpenVinoForward
from camserve_server.errors import ConfigError
from camserve_server.models import load as load_module
from camserve_server.models.model import Model
from tests.conftest import serving
from tests.processes import ROOT, patient_client
from tests.server.engine.test_fast_forward import METHODS, load_small, maps
from tests.support import TIMEOUT_S, call, explained, noise, running, submit

TINY = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4, openvino=True)


@pytest.fixture(autouse=True)
def any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use OpenVINO however fast it is, because the speed depends on the other processes of the machine."""
    monkeypatch.setattr(fast_forward, "OPENVINO_SPEED", 0.0)


def in_openvino(**config: Any) -> Model:
    """Return a small model whose forward pass OpenVINO runs."""
    model = load_small(openvino=True, **config)
    assert isinstance(model.fast_forward, OpenVinoForward)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_those_of_the_network(method: str) -> None:
    torch.testing.assert_close(maps(in_openvino(), method), maps(load_small(), method), rtol=0, atol=1e-5)


def test_logits_in_bf16_agree() -> None:
    model, full = in_openvino(precision="bf16"), load_small()
    X = noise(4, 3, 32, 32)
    assert model.fast_forward is not None
    logits, expected = model.fast_forward(X.bfloat16()), full.module(X)
    assert logits.dtype == torch.bfloat16
    assert 0 < float((logits - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_bits_do_not_depend_on_other_requests() -> None:
    model, x = in_openvino(), noise(3, 32, 32)
    alone = explained(model, x, call(model, "score-cam"), [1])
    with running() as engine:
        others = [submit(engine, model, noise(3, 32, 32, seed=i), call(model, "score-cam"), [2]) for i in range(4)]
        among = submit(engine, model, x, call(model, "score-cam"), [1]).future.result(TIMEOUT_S)
        for other in others:
            other.future.result(TIMEOUT_S)
    assert torch.equal(among.maps, alone.maps)


def test_queries_of_few_rows_run_in_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of OpenVINO has always the same number of rows."""
    rows: list[int] = []
    forward = OpenVinoForward.__call__

    def counted(self: OpenVinoForward, X: Tensor) -> Tensor:
        rows.append(len(X))
        return forward(self, X)

    model = in_openvino()
    monkeypatch.setattr(OpenVinoForward, "__call__", counted)
    explained(model, noise(3, 32, 32), call(model, "grad-cam"), [1])
    assert not rows
    explained(model, noise(3, 32, 32), call(model, "score-cam"), [1])
    assert {*rows} == {4}


@pytest.mark.parametrize(
    ("speed", "config", "reason"),
    [
        (math.inf, {}, r"it is only \d+\.\d\d times as fast as the network"),
        (0.0, {"precision": "fp64"}, "ValueError: OpenVINO runs networks on CPUs in fp32 and bf16, not on cpu in fp64"),
    ],
)
def test_reason_why_openvino_is_not_used_is_logged(
    speed: float, config: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_forward, "OPENVINO_SPEED", speed)
    with capture_logs() as lines:
        model = load_small(openvino=True, **config)
    assert model.fast_forward is None
    [line] = [each for each in lines if each["event"] == "a faster forward pass is not used"]
    assert line["way"] == "OpenVINO"
    assert re.fullmatch(reason, line["reason"])


def test_one_of_several_devices_does_not_use_openvino() -> None:
    model = load_small()
    model.device_name = "cpu:1"
    with pytest.raises(ValueError, match="one of several devices"):
        OpenVinoForward(model, noise(4, 3, 32, 32))


def test_missing_package_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"models.small.openvino: .*pip install 'camserve\[openvino\]'"):
        load_small(openvino=True)
    assert load_small().fast_forward is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"compile": True}, "remove the key openvino or compile"),
        ({"source": "triton:127.0.0.1:8001/x"}, "remove the keys precision, compile and openvino"),
    ],
)
def test_keys_that_exclude_each_other(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({"name": "x", "source": "python:a:b", "openvino": True, **keys})


def test_receipt_names_the_version_and_replay_is_exact() -> None:
    image = noise(32, 32, 3).clamp(0, 1).mul(255).byte().numpy()
    with serving(Config(listen="127.0.0.1:0", models=[TINY])) as server, patient_client(server.address) as client:
        receipt = client.explain(image, method="score-cam").receipt
        assert receipt.versions["openvino"] == metadata.version("openvino")
        assert client.replay(receipt, image).same


@pytest.mark.slow
def test_no_usage_statistics_are_sent() -> None:
    """The import of OpenVINO sends them if it finds the package for it, which pip installs together with OpenVINO."""
    code = (
        "import sys\n"
        "from camserve_server.engine.lanes import fast_forward\n"
        "fast_forward.OPENVINO_SPEED = 0\n"
        "from tests.server.engine.test_openvino import in_openvino\n"
        "in_openvino()\n"
        "print([name for name, module in sys.modules.items() if module and name.startswith('openvino_telemetry')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
