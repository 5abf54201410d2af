"""A method of another package is listed and served, and the laws test it like the methods of camserve."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import camserve
from tests import nets

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CONFIG = """
listen = "127.0.0.1:0"
device = "cpu"

[[models]]
name = "tiny"
source = "python:tests.nets:tiny_cnn"
input_size = [32, 32]
batch_size = 2
"""


def install(folder: Path, project: dict[str, Any], module: str, code: str) -> None:
    """Write the files of an installed package: the module and the metadata of the project."""
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["camserve.methods"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[camserve.methods]", *lines, ""]), encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


def serve(folder: Path) -> list[str]:
    """Return the command that serves a tiny network."""
    (folder / "camserve.toml").write_text(CONFIG, encoding="utf-8")
    return [sys.executable, "-m", "camserve_cli", "serve", "--config", str(folder / "camserve.toml")]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Run a server process with the packages of `folder`, and yield its address."""
    with subprocess.Popen(serve(folder), stdout=subprocess.PIPE, text=True, env=environment(folder)) as server:
        try:
            assert server.stdout is not None
            ready = re.match(r"camserve is ready on (127\.0\.0\.1:\d+),", server.stdout.readline())
            assert ready
            yield ready[1]
        finally:
            server.terminate()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Return a folder with the installed example package."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    code = (HERE / "activation_attention.py").read_text(encoding="utf-8")
    install(tmp_path, project, "activation_attention", code)
    return tmp_path


def activation_attention(A: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """Compute the equation with loops: [K, h, w] → [h, w]."""
    S: NDArray[np.float64] = np.zeros(A.shape[1:])
    for A_k in A:
        for y, x in np.ndindex(S.shape):
            S[y, x] += abs(A_k[y, x]) ** power
    return S


@pytest.mark.slow
def test_method_of_another_package_is_listed_and_served(installed: Path) -> None:
    x = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
    with serving(installed) as address, camserve.Client(address) as client:
        listed = {method.name: method for method in client.methods("tiny")}["activation-attention"]
        (model,) = client.models()
        e = client.explain(
            x.numpy(), method="activation-attention", parameters={"power": 3}, layers=["r1"], target=[2, 4], raw=True
        )
        with pytest.raises(camserve.InvalidArgument) as out_of_range:
            client.explain(x.numpy(), method="activation-attention", parameters={"power": 9})

    assert (listed.title, listed.paper, listed.layers) == ("Activation attention", "arXiv:1612.03928", "one")
    assert (listed.rows, listed.rows_per_target, listed.class_agnostic) == (2, 0, True)
    assert listed.equations == "S = Σ_k |A_k|^p"
    assert listed.advice.startswith("Use it to see the positions")
    [power] = listed.parameters
    assert (power.name, power.default, power.minimum, power.maximum) == ("power", 2.0, 1.0, 8.0)
    assert "activation-attention" in model.methods
    assert out_of_range.value.field == "method.parameters.power"

    (A,) = nets.activations(nets.tiny_cnn(), x[None], ["r1"])  # The layer has the size of the input.
    S = activation_attention(A.double().numpy(), 3)
    for each in e.maps:
        assert each.raw is not None
        np.testing.assert_allclose(each.raw, S, rtol=1e-4)
        np.testing.assert_allclose(each.saliency, (S - S.min()) / (S.max() - S.min()), atol=1e-4)
    assert e.receipt.parameters == {"power": 3}


@pytest.mark.slow
def test_laws_find_the_method_of_another_package(installed: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/laws",
        "-k",
        "activation-attention",
    ]
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(installed), timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stdout
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed
    assert int(passed[1]) > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("raise ValueError('not today')", "not today"),
        ("def (", "invalid syntax"),
        (
            "from camserve_server.registry import method\n"
            "@method('grad-cam', title='Mine', paper='', rows=lambda sizes: 0)\n"
            "def mine(x, c): pass",
            "broken_cam registers 'grad-cam', which camserve_server.methods.grad_cam has already registered",
        ),
    ],
)
def test_error_names_the_entry_point_of_a_broken_package(tmp_path: Path, code: str, message: str) -> None:
    entry_points = {"camserve.methods": {"my-method": "broken_cam"}}
    install(tmp_path, {"name": "broken", "version": "1.0", "entry-points": entry_points}, "broken_cam", code)
    done = subprocess.run(
        serve(tmp_path), capture_output=True, text=True, env=environment(tmp_path), timeout=240, check=False
    )
    assert done.returncode == 2
    [error] = done.stderr.splitlines()
    assert error.startswith("error: the entry point my-method = broken_cam cannot be loaded")
    assert message in error
