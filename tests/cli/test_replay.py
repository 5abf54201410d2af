"""`camserve replay` against the fake server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from camserve import Receipt
from camserve_cli.app import app
from tests.client.fake_server import Servicer


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"}, input=stdin)


@pytest.fixture
def record(address: str, photo: Path, tmp_path: Path) -> Path:
    """Path of the JSON file that an explanation wrote."""
    assert run("explain", photo, "--address", address, "--out", tmp_path).exit_code == 0
    return tmp_path / "cat.json"


@pytest.mark.slow
def test_replay_prints_differences_from_saved_maps(
    address: str, servicer: Servicer, record: Path, photo: Path, tmp_path: Path, ramp: NDArray[np.float32]
) -> None:
    servicer.saliency = ramp + np.eye(8, dtype=np.float32) / np.float32(2)
    arguments = ("replay", record, photo, "--address", address)
    result = run(*arguments)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (1, "not the same map")
    assert re.search(r"map_digests\.281 +sha256:\w{12}… +sha256:\w{12}…", result.stdout)
    assert re.search(r"tabby, cat \(281\) +0\.5 +0\.0625", result.stdout)
    hint = "A receipt does not contain the CPU and the number of threads"
    assert hint in result.stdout
    servicer.receipt_overrides = {"precision": "bf16"}
    assert hint not in run(*arguments).stdout, "the receipts show another reason"
    servicer.receipt_overrides = {}
    np.save(tmp_path / "elsewhere.npy", ramp + 2)
    assert re.search(r" 2 +1\.94 *\n", run(*arguments, "--saliency", tmp_path / "elsewhere.npy").stdout)
    np.save(tmp_path / "elsewhere.npy", ramp[:4])
    assert "another shape: [4, 8]" in run(*arguments, "--saliency", tmp_path / "elsewhere.npy").stdout
    record.with_suffix(".npy").unlink()
    assert "difference" not in run(*arguments).stdout


@pytest.mark.slow
def test_replay_compares_several_saved_maps(
    address: str, servicer: Servicer, photo: Path, tmp_path: Path, ramp: NDArray[np.float32]
) -> None:
    run("explain", photo, "--address", address, "--out", tmp_path, "--top-k", 2)
    servicer.saliency = ramp / np.float32(2)
    arguments = ("replay", tmp_path / "cat.json", photo, "--address", address)
    saved = [tmp_path / "cat.281.npy", tmp_path / "cat.8.npy"]
    result = run(*arguments)
    assert result.stdout.startswith("not the same maps\n")
    for message in (r"tabby, cat \(281\) +0\.5 +0\.25", r"hen \(8\) +0\.5 +0\.25"):
        assert re.search(message, result.stdout)
    assert run(*arguments, "--saliency", saved[0], "--saliency", saved[1]).stdout == result.stdout
    assert run(*arguments, "--saliency", saved[0]).exit_code == 2
    saved[0].unlink()
    assert "tabby" not in run(*arguments).stdout


@pytest.mark.slow
def test_replay_reads_receipts_from_files_and_stdin(address: str, record: Path, photo: Path, tmp_path: Path) -> None:
    arguments = ("--address", address)
    line = run("explain", photo, *arguments, "--out", tmp_path / "new", "--json").stdout
    alone = json.dumps(json.loads(record.read_text())["receipt"])
    (tmp_path / "alone.json").write_text(alone)
    for path, stdin in ((record, None), (tmp_path / "alone.json", None), ("-", alone), ("-", line)):
        result = run("replay", path, photo, *arguments, stdin=stdin)
        assert (result.exit_code, result.stdout) == (0, "the same map, bit for bit\n")


@pytest.mark.slow
def test_replay_reports_another_input_first(
    address: str, servicer: Servicer, record: Path, photo: Path, other_photo: Path
) -> None:
    arguments = ("replay", record, other_photo, "--address", address)
    assert run(*arguments).stdout.splitlines()[:2] == [
        "different input: this is not the image of the receipt",
        "the same map, bit for bit",
    ]
    servicer.receipt_overrides = {"preprocessing": "as given"}
    message, *_ = run(*arguments).stdout.splitlines()
    assert message == "different input: the image was preprocessed in another way"
    servicer.receipt_overrides = {
        "preprocessing": "as given",
        "input_digest": Receipt.from_json(record.read_text()).input_digest,
    }
    assert "different input" not in run(*arguments).stdout


@pytest.mark.slow
def test_replay_reports_invalid_arguments(
    address: str, record: Path, photo: Path, tmp_path: Path, ramp: NDArray[np.float32]
) -> None:
    np.save(tmp_path / "words.npy", np.array(["a"]))
    evaluation = run("evaluate", photo, "--address", address, "--saliency", tmp_path / "cat.npy", "--json").stdout
    for arguments, stdin, message in [
        ((tmp_path / "none.json", photo), None, "No such file or directory"),
        ((record, tmp_path / "none.jpg"), None, "No such file or directory"),
        ((photo, photo), None, "the text is not a receipt"),
        (("-", photo), evaluation, "names no method"),
        ((record, photo, "--saliency", tmp_path / "none.npy"), None, "No such file or directory"),
        ((record, photo, "--saliency", tmp_path / "words.npy"), None, "real numbers"),
    ]:
        result = run("replay", *arguments, "--address", address, stdin=stdin)
        assert (result.exit_code, result.stdout) == (1, "")
        assert re.fullmatch(r"error: [^\n]*\n", result.stderr)
        assert message in result.stderr
