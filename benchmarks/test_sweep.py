"""Tests of the sweep: a few networks in processes of their own, the stored results, and the comparisons."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.sweep import __main__ as sweep
from benchmarks.sweep import page
from benchmarks.sweep.examine import FAILED, MEMORY, REFUSED, SERVED, TIMEOUT, Examined, correlation, grad_cam
from benchmarks.sweep.networks import all_networks
from camserve_server.models.layers import Layer
from tests import nets

FACTS = {"machine": "CPU", "torch": "2", "date": "2026-01-01", "commit": "abc"}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the sweep know a few networks only."""
    names = ["torchvision:squeezenet1_1", "timm:levit_128s", "huggingface:mobilenet_v2", "python:tests.nets:missing"]
    monkeypatch.setattr(sweep, "all_networks", lambda: names)
    return names


@pytest.mark.slow
def test_short_sweep(few: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--out", str(tmp_path)]) == 0, capsys.readouterr().out
    results = {
        each["name"]: Examined(**each) for each in json.loads((tmp_path / "networks.json").read_text())["networks"]
    }
    assert [*results] == few
    for each in few[:3]:
        assert results[each].outcome == SERVED, results[each].reason
        assert results[each].worst_cut is not None
        assert not results[each].breaks_promise
        difference, agreement = results[each].difference, results[each].grad_cam
        assert difference is not None
        assert difference < 1e-4
        assert agreement is not None
        assert agreement > 0.999
    refused = results["python:tests.nets:missing"]
    assert refused.outcome == REFUSED
    assert "missing" in refused.reason
    text = (tmp_path / "networks.md").read_text(encoding="utf-8")
    assert "| timm | 1 | 1 |  | 0 |" in text
    assert "| `levit_128s` | " in text


@pytest.mark.slow
def test_limits_end_a_network(tmp_path: Path, few: list[str]) -> None:
    sweep.main(["--out", str(tmp_path), "--only", "torchvision:vgg11", "--seconds", "0.1"])
    sweep.main(["--out", str(tmp_path), "--only", "torchvision:vgg19", "--gigabytes", "0.6"])
    networks = json.loads((tmp_path / "networks.json").read_text())["networks"]
    assert {each["name"]: each["outcome"] for each in networks} == {
        "torchvision:vgg11": TIMEOUT,
        "torchvision:vgg19": MEMORY,
    }


def test_interrupted_sweep_continues(few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(name: str, seconds: float, gigabytes: float, date: str) -> Examined:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(name)
        return Examined(name, FAILED, "a reason", date=date)

    monkeypatch.setattr(sweep, "_in_a_process", run)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(["--out", str(tmp_path)])
    first = [*ran]
    ran.clear()
    sweep.main(["--out", str(tmp_path)])
    assert (first, ran) == (few[:2], few[2:])


def test_results_of_another_machine_are_discarded(tmp_path: Path) -> None:
    path, results = tmp_path / "networks.json", [Examined("timm:a", SERVED, cuts={"b": 0.1}, size=(7, 7))]
    page.write(path, FACTS, results)
    [stored] = page.read(path, {**FACTS, "date": "2026-02-02"}).values()
    assert stored.cuts == {"b": 0.1}
    assert not page.read(path, {**FACTS, "torch": "3"})


@pytest.mark.parametrize(
    ("cuts", "warnings", "expected"),
    [
        ({"a": 0.0, "b": 0.06}, [], True),
        ({"b": 0.06}, ["a warning"], False),
        ({"b": 0.05}, [], False),
        ({"b": None}, [], False),
    ],
)
def test_cut_value_without_warning_fails_the_sweep(
    cuts: dict[str, float | None],
    warnings: list[str],
    expected: bool,
    few: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = Examined("timm:levit_128s", SERVED, cuts=cuts, warnings=warnings)
    monkeypatch.setattr(sweep, "_in_a_process", lambda name, *limits: replace(result, name=name))
    assert sweep.main(["--out", str(tmp_path), "--only", result.name]) == expected


def test_sweep_contains_all_libraries() -> None:
    names = all_networks()
    assert len(names) == len(set(names))
    count = {
        library: sum(name.startswith(library) for name in names) for library in ("torchvision", "timm", "huggingface")
    }
    assert count["torchvision"] >= 80
    assert count["timm"] >= 90
    assert count["huggingface"] >= 30


def test_grad_cam_is_that_of_the_paper() -> None:
    net, x = nets.tiny_cnn(), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    A = nets.activations(net, x, ["r3"])[0]
    # The logits are linear in the mean of r3, so the gradient is the weight divided by the number of positions.
    expected = torch.einsum("k,khw->hw", net.fc.weight[2] / A[0].numel(), A).relu()
    S = grad_cam(net, Layer("r3", 20, 8, 8), x, 2)
    expected = torch.nn.functional.interpolate(expected[None, None], (32, 32), mode="bilinear")[0, 0]
    np.testing.assert_allclose(S, expected.detach().numpy(), atol=1e-6)


def test_correlation_of_constant_maps() -> None:
    ramp, constant = np.arange(4, dtype=np.float32).reshape(2, 2), np.ones((2, 2), np.float32)
    assert correlation(ramp, 3 * ramp) == pytest.approx(1)
    assert correlation(ramp, -ramp) == pytest.approx(-1)
    assert correlation(constant, constant) == 1
    assert correlation(ramp, constant) is None
