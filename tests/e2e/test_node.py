"""examples/node: a client that is not ours, made of proto/ alone, on a real server."""

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

EXAMPLE = Path(__file__).parents[2] / "examples" / "node"
PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "chelsea.png"


def install() -> None:
    """What package-lock.json pins, beside the example; skips where npm cannot have it."""
    for needed in ("node", "npm"):
        if shutil.which(needed) is None:
            pytest.skip(f"there is no {needed}")
    installed, wanted = EXAMPLE / "node_modules" / ".package-lock.json", EXAMPLE / "package-lock.json"
    if installed.exists() and installed.stat().st_mtime > wanted.stat().st_mtime:
        return
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
    ran = subprocess.run(["npm", "ci", *options], cwd=EXAMPLE, capture_output=True, text=True, check=False, timeout=200)
    if ran.returncode != 0 and any(code in ran.stderr for code in ("ENOTFOUND", "ECONNREFUSED", "ETIMEDOUT", "E403")):
        pytest.skip("npm has no network")
    assert ran.returncode == 0, ran.stderr


def explain(*arguments: object) -> tuple[int, dict[str, Any]]:
    """The exit status, and what was printed by name."""
    line = ["node", str(EXAMPLE / "explain.js"), *map(str, arguments)]
    ran = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120, env={**os.environ})
    assert not ran.stderr, ran.stderr
    return ran.returncode, {
        name: json.loads(value) for name, _, value in (each.partition(": ") for each in ran.stdout.splitlines())
    }


@pytest.mark.slow
def test_node_explains_evaluates_and_reads_errors(server: Server) -> None:
    install()
    status, said = explain(PHOTOGRAPH, server.address)
    assert status == 0
    assert said["target"]["label"]
    assert 0 < said["target"]["probability"] < 1
    assert said["map"] == {"shape": [96, 96], "largest": 1}
    assert said["scores"].keys() == {"average-drop"}
    assert said["evaluated"].keys() == {"average-drop", "insertion"}
    assert said["evaluated"]["average-drop"] == pytest.approx(said["scores"]["average-drop"], abs=1e-3)
    error = said["error"]
    assert (error["code"], error["reason"]) == ("INVALID_ARGUMENT", "OUT_OF_RANGE")
    assert error["field"] == "method.parameters.steps"
    assert error["request_id"]
    assert "expected 1 to" in error["message"]

    status, said = explain(PHOTOGRAPH, server.address, "no-cam")
    assert status == 1
    assert said["failed"]["code"] == "NOT_FOUND"
    assert "grad-cam" in said["failed"]["ErrorInfo"]["metadata"]["known"]
