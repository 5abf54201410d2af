"""The decision about torch.compile, which this machine cannot show: it depends on a GPU and on a C compiler."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from structlog.testing import capture_logs

from camserve_server.config import ModelConfig
from camserve_server.engine.engine import Engine
from camserve_server.models import load as load_module
from camserve_server.pool_devices import unify_fast_forwards
from camserve_server.pool_entries import Replica
from camserve_server.torch_setup import compiler
from camserve_server.torch_setup.compiler import CompileSetting, compile_obstacle, find_c_compiler, use_compile
from tests.nets import tiny_cnn
from tests.support import as_model

SMALL: dict[str, Any] = {"name": "small", "source": "python:tests.nets:tiny_cnn", "input_size": (32, 32)}


@pytest.mark.parametrize(
    ("setting", "device", "obstacle", "expected"),
    [
        ("auto", "cuda", "", (True, "")),
        ("auto", "cuda", "no compiler", (False, "no compiler")),
        ("auto", "cpu", "", (False, "")),
        ("auto", "cpu", "no compiler", (False, "")),
        (True, "cuda", "no compiler", (True, "")),
        (True, "cpu", "", (True, "")),
        (False, "cuda", "", (False, "")),
    ],
)
def test_decision(setting: CompileSetting, device: str, obstacle: str, expected: tuple[bool, str]) -> None:
    assert use_compile(setting, device, lambda: obstacle) == expected


@pytest.mark.parametrize(
    ("environment", "programs", "found"),
    [
        ({}, ["gcc", "clang"], "/bin/gcc"),
        ({}, ["clang"], "/bin/clang"),
        ({}, ["cc", "g++"], None),
        ({"CC": "mycc"}, ["gcc", "mycc"], "/bin/mycc"),
        ({"CC": "mycc"}, ["gcc"], None),
        ({"CC": "ccache gcc"}, ["gcc", "ccache"], None),
        ({"CC": ""}, ["gcc"], None),
    ],
    ids=str,
)
def test_c_compiler_is_the_one_that_triton_calls(
    environment: Mapping[str, str], programs: list[str], found: str | None
) -> None:
    assert find_c_compiler(environment, lambda name: f"/bin/{name}" if name in programs else None) == found


def test_each_missing_part_is_an_obstacle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(compiler, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert compile_obstacle() == ""
    (tmp_path / "Python.h").unlink()
    assert "Python.h" in compile_obstacle()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no C compiler" in compile_obstacle()
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    assert "Triton" in compile_obstacle()


@pytest.mark.parametrize("obstacle", ["", "there is no C compiler"])
def test_model_has_the_decision_and_the_log_the_obstacle(monkeypatch: pytest.MonkeyPatch, obstacle: str) -> None:
    """The decision about a GPU is taken for a model on the CPU here."""
    monkeypatch.setattr(load_module, "compile_obstacle", lambda: obstacle)
    monkeypatch.setattr(
        load_module, "use_compile", lambda setting, device, obstacle: use_compile(setting, "cuda", obstacle)
    )
    with capture_logs() as log:
        model = load_module.load(ModelConfig(**SMALL, precision=("fp32", "bf16")), torch.device("cpu"))
    assert [each.compile for each in model.precisions.values()] == [not obstacle] * 2
    assert [line["reason"] for line in log] == [obstacle] * bool(obstacle)


@pytest.mark.parametrize("value", ["auto", True, False])
def test_values_of_the_key(value: CompileSetting) -> None:
    assert ModelConfig(**SMALL, compile=value).compile == value


def test_other_values_are_refused() -> None:
    with pytest.raises(ValidationError):
        ModelConfig(**SMALL, compile="always")  # type: ignore[arg-type]
    assert ModelConfig(**SMALL, openvino=True).compile == "auto"
    assert ModelConfig(name="r", source="triton:127.0.0.1:8001/x").compile == "auto"


@pytest.mark.parametrize(("compiled", "used"), [((True, True), True), ((True, False), False)])
def test_devices_use_compiled_passes_on_all_or_on_none(compiled: tuple[bool, bool], used: bool) -> None:
    """With CUDA graphs, the compiled pass and the other one have the same type."""
    model = as_model(tiny_cnn())
    replicas = [
        Replica(replace(model, fast_forward=model.module, fast_forward_size=4, compiled=each), Engine())
        for each in compiled
    ]
    unify_fast_forwards(replicas)
    assert [(each.model.fast_forward is not None, each.model.compiled) for each in replicas] == [(used, used)] * 2
