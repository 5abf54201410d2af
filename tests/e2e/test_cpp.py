"""examples/cpp: a client in C++ that uses only the files in proto/, on a real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import skimage

from camserve_server.service.server import Server
from tests.processes import completed

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "chelsea.png"


def build(folder: Path) -> Path:
    """Build the example, which takes half a minute; skip the test without compiler or libraries."""
    for needed in ("g++", "make", "protoc", "grpc_cpp_plugin", "pkg-config"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed")
    if subprocess.run(["pkg-config", "--exists", "grpc++", "protobuf"], check=False).returncode != 0:
        pytest.skip("libgrpc++-dev or libprotobuf-dev is not installed")
    ran = completed(["make", f"--jobs={os.cpu_count()}", f"OUT={folder}", "CXXFLAGS=-O0 -Wall"], cwd=EXAMPLE)
    assert ran.returncode == 0, ran.stderr
    return folder / "explain"


def explain(program: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Run the example and return its exit status and the values that it prints, by name."""
    ran = completed([program, *map(str, arguments)])
    assert not ran.stderr, ran.stderr
    return ran.returncode, {
        name: json.loads(value) for name, _, value in (each.partition(": ") for each in ran.stdout.splitlines())
    }


@pytest.mark.slow
def test_cpp_explains_evaluates_and_reads_errors(server: Server, tmp_path: Path) -> None:
    program = build(tmp_path)
    status, printed = explain(program, PHOTOGRAPH, server.address)
    assert status == 0, printed
    assert printed["target"]["label"]
    assert 0 < printed["target"]["probability"] < 1
    assert printed["map"] == {"shape": [96, 96], "largest": 1}
    assert printed["evaluated"].keys() == {"average-drop", "insertion"}
    assert printed["evaluated"]["average-drop"] == pytest.approx(printed["scores"]["average-drop"], abs=1e-3)
    error = printed["error"]
    assert (error["code"], error["reason"]) == (3, "OUT_OF_RANGE")
    assert error["field"] == "method.parameters.steps"
    assert error["request_id"]
    assert "expected 1 to" in error["message"]

    status, printed = explain(program, PHOTOGRAPH, server.address, "no-cam")
    assert (status, printed["failed"]["code"]) == (1, 5)
    assert "grad-cam" in printed["failed"]["message"]
