"""`camserve evaluate` on many images."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner, Result

import camserve
from camserve.v1 import explain_pb2 as pb
from camserve_cli.app import app
from camserve_cli.study import image_files, score_csv
from camserve_cli.study.annotations import read_boxes, read_labels
from camserve_server.service.server import Server
from tests.client.fake_server import WAIT_S, Servicer, wait_until
from tests.client.proxy import forwarding
from tests.processes import LIMIT_S

METRICS = ("insertion", "average-drop")
# The list contains one method twice, with different parameters.
METHODS = ("grad-cam", "opti-cam:steps=2", "opti-cam:steps=3")
TIMING = ("queue_ms", "compute_ms")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with twelve small image files, of which the fifth is invalid, and a text file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(12):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{seed:02}.png")
    (folder / "04.png").write_bytes(b"no image")
    (folder / "readme.txt").write_text("not an image")
    return folder


# ---- images, labels and boxes ---------------------------------------------------------------------------------------


def test_folder_is_read_as_sorted_image_files(folder: Path) -> None:
    (folder / "00.JPG").write_bytes(b"")
    one = folder / "07.png"
    found = image_files.find_images([one, folder, Path("none.png")])
    assert [path.name for path in found] == [
        "07.png",
        "00.JPG",
        *(f"{i:02}.png" for i in range(12) if i != 7),
        "none.png",
    ]
    (folder.parent / "empty").mkdir()
    with pytest.raises(camserve.InvalidArgument, match="no image files"):
        image_files.find_images([folder.parent / "empty"])


@pytest.mark.parametrize("header", ["", "file,target\n", "\ufeffFile, Target\n\n"])
def test_labels_match_images_by_path_or_name(tmp_path: Path, header: str) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text(header + 'a/dog.jpg,1\nb/dog.jpg,2\n/data/cat.jpg,"tabby, cat"\nhen.jpg,8\n', encoding="utf-8")
    images = [tmp_path / "b" / "dog.jpg", tmp_path / "cat.jpg", tmp_path / "a" / "dog.jpg"]
    assert read_labels(labels, images) == ["2", "tabby, cat", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,target\ndog.jpg\n", "line 2: 'dog.jpg' does not have the form file,target"),
        ("dog.jpg,\n", "line 1: 'dog.jpg,' does not have the form file,target"),
        ("cat.jpg,1\n", "no target for"),
        ("a/dog.jpg,1\nb/dog.jpg,2\n", "2 different targets for"),
        ("dog.jpg,1\ndog.jpg,2\n", "2 different targets for"),
        (b"dog.jpg,caf\xe9\n", "not a CSV file in UTF-8: .* can't decode byte 0xe9"),
        ("dog.jpg,1\n".encode("utf-16"), "not a CSV file in UTF-8"),
        ("dog.jpg,1\nca\0t.jpg,2\n", r"line 2: 'ca\\x00t.jpg,2' does not have the form|not a CSV file"),
        (f'"{"x" * 200_000}",1\n', "not a CSV file in UTF-8: field larger than field limit"),
    ],
)
def test_invalid_label_files_raise(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "labels.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(camserve.InvalidArgument, match=message):
        read_labels(tmp_path / "labels.csv", [tmp_path / "dog.jpg"])


def test_boxes_are_read_from_csv_or_voc_files(tmp_path: Path) -> None:
    images = [tmp_path / "dog.jpg", tmp_path / "cat.jpg"]
    (tmp_path / "boxes.csv").write_text(
        "file,left,top,right,bottom\ncat.jpg,0,1,2,3.5\ndog.jpg,4,5,6,7\ncat.jpg,1,1,2,2\n"
    )
    assert read_boxes(tmp_path / "boxes.csv", images) == [[(4, 5, 6, 7)], [(0, 1, 2, 3.5), (1, 1, 2, 2)]]
    box = "<object><bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>"
    (tmp_path / "dog.xml").write_text(f"<annotation>{box.format(1)}{box.format(5)}</annotation>")
    assert read_boxes(tmp_path, images[:1]) == [[(0, 1, 30, 40), (4, 1, 30, 40)]]
    for text, message in [
        ("dog.jpg,1,2,3\n", "line 1: .* does not have the form file,left,top,right,bottom"),
        ("dog.jpg,1,2,3,x\n", "line 1: .* does not have the form file,left,top,right,bottom"),
        ("cat.jpg,1,2,3,4\n", "no box for .*dog.jpg"),
    ]:
        (tmp_path / "boxes.csv").write_text(text)
        with pytest.raises(camserve.InvalidArgument, match=message):
            read_boxes(tmp_path / "boxes.csv", images)
    for wrong in (
        '<?xml version="1.0" encoding="none"?><annotation/>',
        "<annotation/>",
        "<annotation>",
        f"<annotation>{box.format('x')}</annotation>",
    ):
        (tmp_path / "dog.xml").write_text(wrong)
        with pytest.raises(camserve.InvalidArgument, match=r"not a Pascal VOC file|no box for"):
            read_boxes(tmp_path, images[:1])


# ---- command line ---------------------------------------------------------------------------------------------------


def command(address: str, *arguments: object) -> list[str]:
    """Return the command line of an evaluation by all methods and metrics."""
    line = ["evaluate", *arguments, "--address", address, "--model", "tiny"]
    methods = [text for method in METHODS for text in ("--method", method)]
    metrics = [text for metric in METRICS for text in ("--metric", metric)]
    return [sys.executable, "-m", "camserve_cli", *map(str, line), *methods, *metrics]


def run(server: Server, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = command(server.address, *arguments)
    env = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=env)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def reproducible_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file without values that differ between runs."""
    rows: list[dict[str, Any]] = table(path)
    for row in rows:
        for column in TIMING:
            del row[column]
        if row["receipt"]:
            row["receipt"] = json.loads(row["receipt"]) | {"request_id": ""}
    return rows


def line_count(path: Path) -> int:
    """Return the number of complete lines of a file, 0 if it does not exist."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


class EnoughRows(threading.Event):
    """Event that is also set while a CSV file has at least eight lines.

    A proxy that uses it stops forwarding data, so that the run cannot finish before the test kills it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def is_set(self) -> bool:
        return super().is_set() or line_count(self.path) >= 8


@pytest.mark.slow
def test_killed_run_can_be_resumed_to_identical_files(server: Server, folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ran = run(server, folder, "--csv", whole / "scores.csv", "--npz", whole / "maps.npz")
    assert ran.returncode == 1, "one image is broken"
    assert ran.stderr.count("error: ") == 1
    assert ran.stderr.endswith(" (2 more: UNREADABLE_IMAGE)\n")
    assert ran.stdout.split()[:6] == ["model", "method", "done", *METRICS, "failed"]

    options = ("--csv", cut / "scores.csv", "--npz", cut / "maps.npz", "--in-flight", 2)
    path = cut / "scores.csv"
    with forwarding(server.address, EnoughRows(path)) as proxy_address:
        process = subprocess.Popen(command(proxy_address, folder, *options), stderr=subprocess.DEVNULL)
        wait_until(lambda: process.poll() is not None or line_count(path) >= 8)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = table(path)
    assert 7 <= len(done) < 36
    assert not (cut / "maps.npz").exists()
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines()[-1][:90])  # as if the process had been killed while it wrote a row

    refused = run(server, folder, *options)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--resume" in refused.stderr
    ran = run(server, folder, *options, "--resume")
    assert ran.returncode == 1
    assert ran.stderr.endswith(" (2 more: UNREADABLE_IMAGE)\n"), "failed rows are repeated"

    assert reproducible_rows(path) == reproducible_rows(whole / "scores.csv")
    rows = table(path)
    assert len(rows) == 36
    assert [score_csv.row_key(row) for row in rows] == sorted(score_csv.row_key(row) for row in rows)
    rows_by_key = {score_csv.row_key(row): row for row in rows}
    assert all(rows_by_key[score_csv.row_key(row)] == row for row in done if not row["error"]), (
        "finished rows are not repeated"
    )
    assert [row["image"][-6:] for row in rows if row["error"]] == ["04.png"] * 3
    assert (cut / "maps.npz").read_bytes() == (whole / "maps.npz").read_bytes()
    assert sorted(each.name for each in cut.iterdir()) == ["maps.npz", "scores.csv"]

    (folder / "04.png").write_bytes((folder / "03.png").read_bytes())
    ran = run(server, folder, *options, "--resume")
    assert (ran.returncode, ran.stderr) == (0, "")
    with np.load(cut / "maps.npz") as maps:
        assert len(maps) == 36
        np.testing.assert_array_equal(maps["04.png/tiny/grad-cam"], maps["03.png/tiny/grad-cam"])


def test_files_contain_the_results_of_explain(server: Server, folder: Path, tmp_path: Path) -> None:
    labels, images = tmp_path / "labels.csv", [folder / "02.png", folder / "00.png"]
    labels.write_text("file,target\nphotos/00.png,3\nphotos/02.png,5\n")
    ran = run(server, *images, "--labels", labels, "--csv", tmp_path / "s.csv", "--npz", tmp_path / "m.npz")
    assert (ran.returncode, ran.stderr) == (0, "")
    rows = {score_csv.row_key(row): row for row in table(tmp_path / "s.csv")}
    with camserve.Client(server.address) as client, np.load(tmp_path / "m.npz") as maps:
        assert len(maps) == len(rows) == 6
        for image, target in zip(images, (5, 3), strict=True):
            e = client.explain(
                image, model="tiny", method="opti-cam", parameters={"steps": 2}, target=target, metrics=METRICS
            )
            row = rows[str(image), "tiny", "opti-cam:steps=2"]
            np.testing.assert_array_equal(maps[f"{image.name}/tiny/opti-cam:steps=2"], e.saliency)
            assert maps[f"{image.name}/tiny/opti-cam:steps=2"].dtype == np.float32
            assert {metric: float(row[metric]) for metric in METRICS} == e.scores
            assert (row["target"], row["probability"]) == (str(target), str(e.target.probability))
            assert (row["rows"], row["share"], row["error"]) == (str(e.cost.rows), "1.0", "")
            assert camserve.Receipt.from_json(row["receipt"]).map_digests == e.receipt.map_digests
            assert json.loads(row["curves"]) == {"insertion": pytest.approx(e.scores["insertion"].curve, rel=1e-5)}


def evaluate(server: Server, *arguments: object) -> Result:
    """Run `camserve evaluate` with one fast metric."""
    line = [
        "evaluate",
        *map(str, arguments),
        "--address",
        server.address,
        "--model",
        "tiny",
        "--metric",
        "average-drop",
    ]
    return CliRunner().invoke(app, line)


def test_maps_of_a_single_method_are_named_by_image(server: Server, folder: Path, tmp_path: Path) -> None:
    arguments = (folder / "00.png", folder / "01.png", "--csv", tmp_path / "s.csv", "--npz", tmp_path / "m.npz")
    assert evaluate(server, *arguments, "--method", "grad-cam").exit_code == 0
    with np.load(tmp_path / "m.npz") as maps:
        assert sorted(maps) == ["00.png", "01.png"]


@pytest.mark.slow
def test_resume_rejects_the_file_of_another_run(server: Server, folder: Path, tmp_path: Path) -> None:
    arguments = (folder / "00.png", "--csv", tmp_path / "s.csv", "--method", "opti-cam", "--resume")
    first = evaluate(server, *arguments, "--param", "steps=2")
    assert first.exit_code == 0, first.stderr
    before = (tmp_path / "s.csv").read_bytes()
    for options, message in [
        (("--param", "steps=2", "--metric", "insertion"), "has the metrics average-drop; this run uses insertion"),
        (("--param", "steps=3"), "the existing row uses steps 2; this run uses 3"),
        (("--param", "steps=2", "--seed", 4), "the existing row uses seed 0; this run uses 4"),
        (("--param", "steps=2", "--precision", "bf16"), "the existing row uses precision fp32; this run uses bf16"),
    ]:
        again = evaluate(server, *arguments, *options)
        assert again.exit_code == 1
        assert message in again.stderr
    assert (tmp_path / "s.csv").read_bytes() == before
    for name, then, now in [("precision", "fp32", "bf16"), ("weights", "sha256:", "sha256:0")]:
        (tmp_path / "s.csv").write_bytes(before.replace(then.encode(), now.encode()))
        again = evaluate(server, *arguments, "--param", "steps=2")
        assert again.exit_code == 1
        assert f"the existing row uses {name} {now}" in again.stderr
        assert f"this run uses {then}" in again.stderr


@pytest.mark.slow
def test_unknown_names_fail_before_files_are_written(server: Server, folder: Path, tmp_path: Path) -> None:
    arguments = (folder, "--csv", tmp_path / "s.csv")
    for options in (
        ("--method", "no-cam"),
        ("--method", "cam", "--metric", "no"),
        ("--method", "cam", "--model", "no"),
    ):
        ran = evaluate(server, *arguments, *options)
        assert (ran.exit_code, ran.stderr[:15]) == (1, "error: there is")
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.slow
def test_localisation_metrics_require_boxes(server: Server, folder: Path, tmp_path: Path) -> None:
    arguments = (folder / "00.png", folder / "01.png", "--method", "cam", "--metric", "pointing-game")
    refused = evaluate(server, *arguments, "--csv", tmp_path / "s.csv")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: the metric pointing-game needs the position of the target; give --boxes")
    assert not (tmp_path / "s.csv").exists()
    (tmp_path / "boxes.csv").write_text("00.png,0,0,36,40\n01.png,35,39,36,40\n")
    ran = evaluate(server, *arguments, "--csv", tmp_path / "s.csv", "--boxes", tmp_path / "boxes.csv")
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert [float(row["pointing-game"]) for row in table(tmp_path / "s.csv")] == [1, 0]
    again = ("--csv", tmp_path / "s.csv", "--resume", "--boxes")
    assert evaluate(server, *arguments, *again, tmp_path / "boxes.csv").exit_code == 0
    (tmp_path / "others.csv").write_text("00.png,0,0,36,39\n01.png,35,39,36,40\n")
    other = evaluate(server, *arguments, *again, tmp_path / "others.csv")
    assert other.exit_code == 1
    existing, current = "boxes [[0.0, 0.0, 36.0, 40.0]]", "[[0.0, 0.0, 36.0, 39.0]]"
    assert f"00.png by cam: the existing row uses {existing}; this run uses {current}" in other.stderr
    one = evaluate(server, arguments[0], *arguments[2:], "--boxes", tmp_path / "boxes.csv")
    assert re.search(r"pointing-game +1\b", one.stdout)


@pytest.mark.slow
def test_invalid_usage_exits_with_2(server: Server, folder: Path, tmp_path: Path) -> None:
    image, labels = folder / "00.png", tmp_path / "labels.csv"
    out = ("--csv", tmp_path / "s.csv")
    for wrong in [
        (folder, "--method", "cam"),
        (image, image, "--method", "cam"),
        (image, "--method", "cam", "--method", "grad-cam"),
        (image, "--method", "cam", "--npz", tmp_path / "m.npz"),
        (image, "--method", "cam", "--resume"),
        (image, *out),
        (image, "--method", "cam:steps", *out),
        (image, "--method", "cam", "--json", *out),
        (image, "--method", "cam", "--target", 1, "--labels", labels, *out),
    ]:
        assert evaluate(server, *wrong).exit_code == 2, wrong
    missing = evaluate(server, image, "--method", "cam", "--labels", labels, *out)
    assert (missing.exit_code, missing.stderr) == (1, f"error: No such file or directory: {labels}\n")


@pytest.mark.slow
def test_ctrl_c_keeps_finished_results(address: str, servicer: Servicer, folder: Path, tmp_path: Path) -> None:
    def block_the_second(context: Any) -> None:
        if len([each for each in servicer.requests if isinstance(each, pb.ExplainRequest)]) == 2:
            context.add_callback(servicer.cancelled.set)
            servicer.started.set()
            servicer.cancelled.wait(WAIT_S)

    servicer.before = block_the_second
    line = ["evaluate", str(folder), "--method", "opti-cam", "--metric", "insertion", "--address", address]
    process = subprocess.Popen(
        [sys.executable, "-m", "camserve_cli", *line, "--in-flight", "1", "--csv", str(tmp_path / "s.csv")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert servicer.started.wait(WAIT_S)
    wait_until(lambda: line_count(tmp_path / "s.csv") >= 2)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert message == (
        f"{tmp_path / 's.csv'} contains the finished lines; continue with the same command and --resume\ncancelled\n"
    )
    assert servicer.cancelled.wait(WAIT_S)
    assert [row["image"][-6:] for row in table(tmp_path / "s.csv")] == ["00.png"]


def test_progress_is_printed_to_stderr_and_means_to_stdout(
    address: str, servicer: Servicer, folder: Path, tmp_path: Path
) -> None:
    def refuse_the_third(context: Any) -> None:
        if len([each for each in servicer.requests if isinstance(each, pb.ExplainRequest)]) == 3:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "un-\nreadable")

    servicer.before = refuse_the_third
    options = ["--method", "opti-cam", "--method", "fake-cam", "--metric", "insertion", "--in-flight", "1"]
    line = ["evaluate", str(folder), *options, "--csv", str(tmp_path / "s.csv"), "--address", address]
    result = CliRunner().invoke(app, line, env={"COLUMNS": "200", "FORCE_COLOR": "1"})
    plain, message = (re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text) for text in (result.stdout, result.stderr))
    assert result.exit_code == 1
    assert "24/24 1 failed" in message
    assert f"error: {folder / '01.png'}, first, opti-cam: un-\nreadable" in message
    assert [line.split() for line in plain.splitlines()] == [
        ["model", "method", "done", "insertion", "failed"],
        ["first", "fake-cam", "12", "0.25"],
        ["first", "opti-cam", "11", "0.25", "1"],
    ]
    [row] = [row for row in table(tmp_path / "s.csv") if row["error"]]
    assert (row["error"], row["target"], row["receipt"]) == ("un- readable", "", "")
