"""File names, arguments and terminals with other encodings than UTF-8."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from camserve.errors import InvalidArgument
from camserve.request_fields import method_spec
from camserve_cli.options import read_parameters, read_target
from tests.support import TIMEOUT_S


def run(*arguments: str | Path, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, because the arguments and the output of a process are bytes."""
    return subprocess.run(
        [sys.executable, "-m", "camserve_cli", *arguments],
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1", "COLUMNS": "200"},
        capture_output=True,
        encoding=encoding,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_file_name_that_is_not_utf8(address: str, photo: Path, tmp_path: Path, encoding: str) -> None:
    image = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copy(photo, image)
    out = tmp_path / "out"
    shared = ("explain", image, "--method", "grad-cam", "--address", address, "--out", out)
    printed = run(*shared, "--json", encoding=encoding)
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout)["image"] == str(image)
    assert json.loads((out / f"{image.stem}.json").read_bytes())["image"] == str(image)
    table = run(*shared, encoding=encoding)
    assert table.returncode == 0, table.stderr


@pytest.mark.slow
def test_argument_that_is_not_utf8(address: str, photo: Path, tmp_path: Path) -> None:
    result = run("explain", photo, "--address", address, "--out", tmp_path, "--target", os.fsdecode(b"\xff"))
    assert (result.returncode, result.stderr) == (
        1,
        "error: '\\udcff' contains bytes that are not UTF-8; expected UTF-8\n",
    )


@pytest.mark.slow
def test_terminal_without_a_character_of_the_output() -> None:
    result = run("config", "check", encoding="latin-1")
    assert result.returncode == 0, result.stderr
    assert "\\u2013" in result.stdout


def test_numbers_that_python_cannot_convert() -> None:
    digits = "1" * 5000
    assert read_target(digits) == digits
    assert read_parameters([f"a={digits}", f"b={'[' * 100_000}"]) == {"a": digits, "b": "[" * 100_000}
    with pytest.raises(InvalidArgument, match="expected numbers"):
        method_spec("grad-cam", {"a": 2**2000}, None, 0)
