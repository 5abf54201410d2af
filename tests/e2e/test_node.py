"""examples/node: a client in JavaScript that uses only the files in proto/, on a real server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import skimage

from camserve_server.service.server import Server
from tests.processes import completed

EXAMPLE = Path(__file__).parents[2] / "examples" / "node"
PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "chelsea.png"


def install() -> None:
    """Install the packages of package-lock.json beside the example; skip the test if npm has no network."""
    for needed in ("node", "npm"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed")
    installed, wanted = EXAMPLE / "node_modules" / ".package-lock.json", EXAMPLE / "package-lock.json"
    if installed.exists() and installed.stat().st_mtime > wanted.stat().st_mtime:
        return
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
    ran = completed(["npm", "ci", *options], cwd=EXAMPLE)
    if ran.returncode != 0 and any(code in ran.stderr for code in ("ENOTFOUND", "ECONNREFUSED", "ETIMEDOUT", "E403")):
        pytest.skip("npm has no network")
    assert ran.returncode == 0, ran.stderr


def explain(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Run the example and return its exit status and the values that it prints, by name."""
    line = ["node", str(EXAMPLE / "explain.js"), *map(str, arguments)]
    ran = completed(line)
    assert not ran.stderr, ran.stderr
    return ran.returncode, {
        name: json.loads(value) for name, _, value in (each.partition(": ") for each in ran.stdout.splitlines())
    }


@pytest.mark.slow
def test_node_explains_evaluates_and_reads_errors(server: Server) -> None:
    install()
    status, printed = explain(PHOTOGRAPH, server.address)
    assert status == 0
    assert printed["target"]["label"]
    assert 0 < printed["target"]["probability"] < 1
    assert printed["map"] == {"shape": [96, 96], "largest": 1}
    assert printed["scores"].keys() == {"average-drop"}
    assert printed["evaluated"].keys() == {"average-drop", "insertion"}
    assert printed["evaluated"]["average-drop"] == pytest.approx(printed["scores"]["average-drop"], abs=1e-3)
    error = printed["error"]
    assert (error["code"], error["reason"]) == ("INVALID_ARGUMENT", "OUT_OF_RANGE")
    assert error["field"] == "method.parameters.steps"
    assert error["request_id"]
    assert "expected 1 to" in error["message"]

    status, printed = explain(PHOTOGRAPH, server.address, "no-cam")
    assert status == 1
    assert printed["failed"]["code"] == "NOT_FOUND"
    assert "grad-cam" in printed["failed"]["ErrorInfo"]["metadata"]["known"]
