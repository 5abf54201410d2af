"""Every method and metric on a GPU, compared with the CPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from camserve_server.config import ModelConfig
from camserve_server.engine.warmup import warm_up
from camserve_server.models.load import load
from camserve_server.models.model import Model
from camserve_server.registry import METHODS, METRICS
from tests.support import call, explained, metric, noise

pytestmark = pytest.mark.gpu
X = noise(3, 32, 32)
OTHERS = {("cam", "tiny_vit"), ("attention-rollout", "tiny_cnn"), ("raw-attention", "tiny_cnn")}  # not available
# Ten steps, because Adam makes whole steps even from gradients that are rounding.
OPTIONS: dict[str, dict[str, Any]] = {"opti-cam": {"steps": 10}, "rise": {"masks": 500}}


@lru_cache
def model(net: str, device: str) -> Model:
    config = {"name": net, "source": f"python:tests.nets:{net}", "input_size": (32, 32), "compile": False}
    made = load(ModelConfig.model_validate({**config, "precision": "fp32"}), torch.device(device))
    warm_up(made, 4)
    return made


@pytest.mark.parametrize("net", ["tiny_cnn", "tiny_vit"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_agree_with_the_cpu(name: str, net: str) -> None:
    if (name, net) in OTHERS:
        return
    on_cpu, on_gpu = (
        explained(of, X, call(of, name, **OPTIONS.get(name, {})), [1, 3])
        for of in (model(net, "cpu"), model(net, "cuda"))
    )
    assert on_gpu.warnings == on_cpu.warnings
    torch.testing.assert_close(on_gpu.maps, on_cpu.maps, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_metrics_agree_with_the_cpu(name: str) -> None:
    on_cpu, on_gpu = (
        explained(of, X, call(of, "grad-cam"), [1, 3], [metric(name)])
        for of in (model("tiny_cnn", "cpu"), model("tiny_cnn", "cuda"))
    )
    for ours, theirs in zip(on_gpu.scores, on_cpu.scores, strict=True):
        assert [each.value for each in ours] == pytest.approx([each.value for each in theirs], abs=1e-3, nan_ok=True)
