"""Many images by many methods: the clients on a fake that counts, the command line on a real server."""

from __future__ import annotations

import asyncio
import csv
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, get_args

import grpc
import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

import camserve
from camserve import Variant, batches, request_messages
from camserve.v1 import explain_pb2 as pb
from camserve_cli.app import app
from camserve_cli.study import annotations, score_csv
from camserve_server.errors import QueueFull
from camserve_server.service import status
from camserve_server.service.server import Server

METRICS = ("insertion", "average-drop")
# One method twice, the second time under another label.
METHODS = ("grad-cam", "opti-cam:steps=2", "opti-cam:steps=3")
TIMING = ("queue_ms", "compute_ms")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve small images, the fifth of which is none, and a file of another kind."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(12):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{seed:02}.png")
    (folder / "04.png").write_bytes(b"no image")
    (folder / "readme.txt").write_text("not an image")
    return folder


# ---- the clients ----------------------------------------------------------------------------------------------------


class Counter:
    """Holds each request of a fake for a moment, and knows how many were there at once."""

    def __init__(self) -> None:
        self.here = self.most = 0
        self.lock = threading.Lock()

    def __call__(self, _: Any) -> None:
        with self.lock:
            self.here += 1
            self.most = max(self.most, self.here)
        time.sleep(0.02)
        with self.lock:
            self.here -= 1


def places(results: Any) -> set[tuple[int, str, str]]:
    return {(result.index, result.model, result.method) for result in results}


def test_every_image_by_every_method_on_every_model(servicer, client, pixels, ramp):
    variants = ["grad-cam", Variant("short", "opti-cam", {"steps": 2}, layers=["deep"], seed=7)]
    results = list(
        client.evaluate_many(
            [pixels, pixels],
            methods=variants,
            models=["a", "b"],
            metrics={"insertion": {"steps": 9}},
            labels=[8, "cock"],
        )
    )
    assert places(results) == {(i, model, name) for i in (0, 1) for model in "ab" for name in ("grad-cam", "short")}
    for result in results:
        assert result.error is None
        assert result.image is pixels
        assert result.target.index == (8, 7)[result.index]
        assert (result.scores, result.cost.rows) == ({"insertion": 0.25}, 12)
        assert result.warnings == ("degenerate: the map is a ramp",)
        assert result.receipt.method == {"grad-cam": "grad-cam", "short": "opti-cam"}[result.method]
        np.testing.assert_array_equal(result.saliency, ramp)
    [asked] = [
        each
        for each in servicer.requests
        if (each.method.name, each.model, each.targets[0].index) == ("opti-cam", "a", 8)
    ]
    assert (dict(asked.method.parameters.items()), asked.method.layers, asked.method.seed) == (
        {"steps": 2},
        ["deep"],
        7,
    )
    assert dict(asked.metrics[0].parameters.items()) == {"steps": 9}


def test_the_forms_of_methods(client, pixels):
    for methods in ("grad-cam", ["grad-cam"], {"grad-cam": {"steps": 2}}, [Variant("grad-cam", "grad-cam")]):
        [result] = client.evaluate_many(iter([pixels]), methods=methods, metrics="insertion")
        assert (result.model, result.method, result.receipt.model) == ("first", "grad-cam", "first")


def test_a_failure_stops_nobody_and_says_itself(client, pixels):
    images = [pixels, "none.png", np.zeros((2, 2)), None, pixels]
    results = {result.index: result for result in client.evaluate_many(images, methods=["a", "b"], in_flight=2)}
    errors = [type(results[index].error) for index in range(5)]
    assert errors == [type(None), FileNotFoundError, camserve.InvalidArgument, camserve.InvalidArgument, type(None)]
    with pytest.raises(FileNotFoundError):
        _ = results[1].scores
    with camserve.Client("127.0.0.1:1") as nobody:
        [result] = nobody.evaluate_many([pixels], methods="a")
    assert isinstance(result.error, camserve.Unavailable)
    assert result.model == ""


class Full:
    """Too busy for the first requests of each image, as the server says it."""

    def __init__(self, refusals: int) -> None:
        self.left = refusals

    def __call__(self, context: Any) -> None:
        self.left -= 1
        if self.left >= 0:
            error = QueueFull("too many rows are owed", retry_after_s=0.01)
            context.set_trailing_metadata(status.trailing_metadata(error, "given"))
            context.abort(status.code(error), str(error))


def test_where_the_server_is_full_a_request_waits_and_is_made_again(servicer, address, client, pixels, monkeypatch):
    monkeypatch.setattr(batches, "_LEAST_WAIT_S", 0.001)
    servicer.before = Full(5)
    results = list(client.evaluate_many([pixels] * 4, methods="a", in_flight=3))
    assert [result.error for result in results] == [None] * 4
    assert len(servicer.requests) == 9

    async def ask() -> list[camserve.Result]:
        async with camserve.aio.Client(address) as client:
            return [result async for result in client.evaluate_many([pixels] * 2, methods="a")]

    servicer.before = Full(3)
    assert [result.error for result in asyncio.run(ask())] == [None] * 2
    servicer.before = Full(1000)
    monkeypatch.setattr(batches, "_MOST_TRIES", 3)
    servicer.requests.clear()
    [result] = client.evaluate_many([pixels], methods="a")
    assert isinstance(result.error, camserve.ResourceExhausted)
    assert len(servicer.requests) == 3


def test_each_image_has_its_own_truth(servicer, address, client, pixels):
    def asked() -> list[tuple[int, bool]]:
        return [(len(each.truth.boxes), each.truth.HasField("mask")) for each in servicer.requests]

    truths: Any = {"boxes": [[(0, 0, 2, 3), (1, 1, 2, 2)], None], "masks": iter([None, np.eye(3)])}
    assert all(not each.error for each in client.evaluate_many([pixels] * 2, methods="a", in_flight=1, **truths))
    assert asked() == [(2, False), (0, True)]

    async def ask() -> None:
        async with camserve.aio.Client(address) as client:
            assert [each.error async for each in client.evaluate_many([pixels], methods="a", boxes=[(0, 0, 1, 1)])] == [
                None
            ]

    servicer.requests.clear()
    asyncio.run(ask())
    assert asked() == [(1, False)]
    with pytest.raises(ValueError, match="longer"):
        list(client.evaluate_many([pixels], methods="a", boxes=[None, None]))


def test_no_more_than_asked_for_is_in_flight_or_read(servicer, client, pixels):
    servicer.before = counter = Counter()
    read = 0

    def images() -> Iterator[np.ndarray]:
        nonlocal read
        for _ in range(12):
            read += 1
            yield pixels

    for number, _ in enumerate(client.evaluate_many(images(), methods=["a", "b"], in_flight=4), 1):
        assert read <= (number + 4 + 1) / 2 + 1
    assert number == 24
    assert 2 <= counter.most <= 4


def test_wrong_arguments_are_raised_at_once(client, pixels):
    for wrong in ({"in_flight": 0}, {"methods": ["a", "a"]}, {"images": "dog.jpg"}):
        with pytest.raises(camserve.InvalidArgument):
            client.evaluate_many(**{"images": [pixels], "methods": "a"} | wrong)
    with pytest.raises(ValueError, match="shorter"):
        list(client.evaluate_many([pixels, pixels], methods="a", labels=[1]))


def test_what_is_skipped_is_not_asked_for(servicer, client, pixels):
    done = client.evaluate_many([pixels] * 2, methods=["a", "b"], models="m", skip={(0, "m", "a"), (1, "m", "b")})
    assert places(done) == {(0, "m", "b"), (1, "m", "a")}
    assert len(servicer.requests) == 2


def test_leaving_early_cancels_what_is_in_flight(servicer, client, pixels):
    results = client.evaluate_many([pixels, "none.png"], methods="a", models="slow", in_flight=2)
    assert isinstance(next(results).error, FileNotFoundError)
    assert servicer.started.wait(5)
    results.close()
    assert servicer.cancelled.wait(5)


def test_the_awaited_client_does_the_same(servicer, address, pixels):
    servicer.before = counter = Counter()

    async def ask() -> None:
        async with camserve.aio.Client(address) as client:
            results = client.evaluate_many([pixels, "none.png"] * 6, methods=["a", "b"], in_flight=4)
            found = [result async for result in results]
            assert {(each.index, each.method) for each in found} == {(i, name) for i in range(12) for name in "ab"}
            assert all((each.error is None) == (each.index % 2 == 0) for each in found)
            servicer.before = lambda context: None
            async with aclosing(client.evaluate_many(["none.png", pixels], methods="a", models="slow")) as results:
                async for result in results:
                    assert isinstance(result.error, FileNotFoundError)
                    assert await asyncio.to_thread(servicer.started.wait, 5)
                    break
            assert await asyncio.to_thread(servicer.cancelled.wait, 5)

    asyncio.run(ask())
    assert 2 <= counter.most <= 4


def test_many_are_explained_from_an_iterator_without_a_length(servicer, address, client, pixels):
    images = (each for each in [pixels, "none.png", pixels])
    found = {each.index: each for each in client.explain_many(images, method="grad-cam", top_k=2, in_flight=2)}
    assert [type(found[index].error) for index in range(3)] == [type(None), FileNotFoundError, type(None)]
    assert found[0].image is pixels
    assert [each.target.index for each in found[2].explanation.maps] == [281, 8]
    assert (found[2].model, found[2].method) == ("first", "grad-cam")
    labelled = client.explain_many([pixels] * 3, labels=[7, "hen", None])
    assert {each.index: each.target.index for each in labelled} == {0: 7, 1: 8, 2: 281}
    assert [each.target.index for each in client.explain_many([pixels] * 2, target=8)] == [8, 8]

    async def ask() -> set[int]:
        async with camserve.aio.Client(address) as client:
            return {each.index async for each in client.explain_many(iter([pixels] * 9), in_flight=3)}

    assert asyncio.run(ask()) == {*range(9)}
    for wrong in ({"in_flight": 0}, {"images": "dog.jpg"}, {"target": 1, "labels": [1]}):
        with pytest.raises(camserve.InvalidArgument):
            client.explain_many(**{"images": [pixels]} | wrong)


def test_many_take_the_options_of_one():
    one, several = (
        set(inspect.signature(each).parameters) for each in (request_messages.explain, batches.explain_many)
    )
    of_each = {"image", "boxes", "mask", "request_id", "batch_sizes"}
    assert several == one - of_each | {"images", "labels", "in_flight"}


def test_the_options_of_many_arrive(servicer, client, pixels):
    options = {
        "model": "m",
        "method": "opti-cam",
        "target": 7,
        "layers": ["a"],
        "parameters": {"steps": 2},
        "metrics": ["insertion"],
        "seed": 3,
        "budget": 9,
        "precision": "bf16",
        "priority": "low",
        "predictions": 2,
        "raw": True,
        "timeout": 20,
    }
    [result] = client.explain_many([pixels], **options)
    client.explain(pixels, **options)
    assert result.error is None
    assert servicer.requests[0] == servicer.requests[1]


@pytest.mark.parametrize("name", ["evaluate_many", "explain_many"])
def test_both_clients_have_the_same_signature(name):
    sync, awaited = getattr(camserve.Client, name), getattr(camserve.aio.Client, name)
    assert (sync.__name__, sync.__doc__) == (awaited.__name__, awaited.__doc__)
    ours, theirs = inspect.signature(sync), inspect.signature(awaited)
    assert ours.parameters == theirs.parameters
    assert get_args(ours.return_annotation) == get_args(theirs.return_annotation) == (camserve.Result,)


# ---- which images, and their labels ---------------------------------------------------------------------------------


def test_a_folder_is_its_image_files_in_order(folder):
    (folder / "00.JPG").write_bytes(b"")
    one = folder / "07.png"
    found = score_csv.image_files([one, folder, Path("none.png")])
    assert [path.name for path in found] == [
        "07.png",
        "00.JPG",
        *(f"{i:02}.png" for i in range(12) if i != 7),
        "none.png",
    ]
    (folder.parent / "empty").mkdir()
    with pytest.raises(camserve.InvalidArgument, match="no image files"):
        score_csv.image_files([folder.parent / "empty"])


@pytest.mark.parametrize("header", ["", "file,target\n", "\ufeffFile, Target\n\n"])
def test_labels_are_found_by_path_or_by_name(tmp_path, header):
    labels = tmp_path / "labels.csv"
    labels.write_text(header + 'a/dog.jpg,1\nb/dog.jpg,2\n/data/cat.jpg,"tabby, cat"\nhen.jpg,8\n', encoding="utf-8")
    images = [tmp_path / "b" / "dog.jpg", tmp_path / "cat.jpg", tmp_path / "a" / "dog.jpg"]
    assert annotations.read_labels(labels, images) == ["2", "tabby, cat", "1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,target\ndog.jpg\n", "line 2: expected file,target, not 'dog.jpg'"),
        ("dog.jpg,\n", "line 1: expected file,target"),
        ("cat.jpg,1\n", "no target for"),
        ("a/dog.jpg,1\nb/dog.jpg,2\n", "several targets for"),
        ("dog.jpg,1\ndog.jpg,2\n", "several targets for"),
    ],
)
def test_wrong_labels_are_said(tmp_path, text, said):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(camserve.InvalidArgument, match=said):
        annotations.read_labels(tmp_path / "labels.csv", [tmp_path / "dog.jpg"])


def test_boxes_are_lines_in_pixels_or_voc_files(tmp_path):
    images = [tmp_path / "dog.jpg", tmp_path / "cat.jpg"]
    (tmp_path / "boxes.csv").write_text(
        "file,left,top,right,bottom\ncat.jpg,0,1,2,3.5\ndog.jpg,4,5,6,7\ncat.jpg,1,1,2,2\n"
    )
    assert annotations.read_boxes(tmp_path / "boxes.csv", images) == [[(4, 5, 6, 7)], [(0, 1, 2, 3.5), (1, 1, 2, 2)]]
    box = "<object><bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>"
    (tmp_path / "dog.xml").write_text(f"<annotation>{box.format(1)}{box.format(5)}</annotation>")
    assert annotations.read_boxes(tmp_path, images[:1]) == [[(0, 1, 30, 40), (4, 1, 30, 40)]]
    for text, said in [
        ("dog.jpg,1,2,3\n", "line 1: expected file,left,top,right,bottom"),
        ("dog.jpg,1,2,3,x\n", "line 1: expected file,left,top,right,bottom"),
        ("cat.jpg,1,2,3,4\n", "no box for .*dog.jpg"),
    ]:
        (tmp_path / "boxes.csv").write_text(text)
        with pytest.raises(camserve.InvalidArgument, match=said):
            annotations.read_boxes(tmp_path / "boxes.csv", images)
    for wrong in ("<annotation/>", "<annotation>", f"<annotation>{box.format('x')}</annotation>"):
        (tmp_path / "dog.xml").write_text(wrong)
        with pytest.raises(camserve.InvalidArgument, match=r"no Pascal VOC file|no box for"):
            annotations.read_boxes(tmp_path, images[:1])


# ---- the command line -----------------------------------------------------------------------------------------------


def command(server: Server, *arguments: object) -> list[str]:
    given = ["evaluate", *arguments, "--address", server.address, "--model", "tiny"]
    methods = [text for method in METHODS for text in ("--method", method)]
    return [sys.executable, "-m", "camserve_cli", *map(str, given), *methods]


def run(server: Server, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [*command(server, *arguments), *(text for metric in METRICS for text in ("--metric", metric))]
    env = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120, env=env)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def lasting(path: Path) -> list[dict[str, Any]]:
    """The rows but for what differs from run to run."""
    rows: list[dict[str, Any]] = table(path)
    for row in rows:
        for column in TIMING:
            del row[column]
        if row["receipt"]:
            row["receipt"] = json.loads(row["receipt"]) | {"request_id": ""}
    return rows


def test_a_killed_run_goes_on_to_the_same_files(server: Server, folder: Path, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ran = run(server, folder, "--csv", whole / "scores.csv", "--npz", whole / "maps.npz")
    assert ran.returncode == 1, "one image is broken"
    assert ran.stderr.count("error: ") == 3
    assert ran.stdout.split()[:6] == ["model", "method", "done", *METRICS, "failed"]

    options = ("--csv", cut / "scores.csv", "--npz", cut / "maps.npz", "--in-flight", 2)
    metrics = (text for metric in METRICS for text in ("--metric", metric))
    process = subprocess.Popen([*command(server, folder, *options), *metrics], stderr=subprocess.DEVNULL)
    path = cut / "scores.csv"
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 8):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    done = table(path)
    assert 7 <= len(done) < 36
    assert not (cut / "maps.npz").exists()
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines()[-1][:90])  # as if the process had died while it wrote

    refused = run(server, folder, *options)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--resume" in refused.stderr
    ran = run(server, folder, *options, "--resume")
    assert ran.returncode == 1
    assert ran.stderr.count("error: ") == 3, "errors are tried again"

    assert lasting(path) == lasting(whole / "scores.csv")
    rows = table(path)
    assert len(rows) == 36
    assert [score_csv.key_of(row) for row in rows] == sorted(score_csv.key_of(row) for row in rows)
    known = {score_csv.key_of(row): row for row in rows}
    assert all(known[score_csv.key_of(row)] == row for row in done if not row["error"]), "what was done is not repeated"
    assert [row["image"][-6:] for row in rows if row["error"]] == ["04.png"] * 3
    assert (cut / "maps.npz").read_bytes() == (whole / "maps.npz").read_bytes()
    assert sorted(each.name for each in cut.iterdir()) == ["maps.npz", "scores.csv"]

    (folder / "04.png").write_bytes((folder / "03.png").read_bytes())
    ran = run(server, folder, *options, "--resume")
    assert (ran.returncode, ran.stderr) == (0, "")
    with np.load(cut / "maps.npz") as maps:
        assert len(maps) == 36
        np.testing.assert_array_equal(maps["04.png/tiny/grad-cam"], maps["03.png/tiny/grad-cam"])


def test_the_files_hold_what_explain_gives(server: Server, folder: Path, tmp_path: Path):
    labels, images = tmp_path / "labels.csv", [folder / "02.png", folder / "00.png"]
    labels.write_text("file,target\nphotos/00.png,3\nphotos/02.png,5\n")
    ran = run(server, *images, "--labels", labels, "--csv", tmp_path / "s.csv", "--npz", tmp_path / "m.npz")
    assert (ran.returncode, ran.stderr) == (0, "")
    rows = {score_csv.key_of(row): row for row in table(tmp_path / "s.csv")}
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


def evaluate(server: Server, *arguments: object) -> subprocess.CompletedProcess[str]:
    """With one method and one quick metric."""
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
    return subprocess.run(
        [sys.executable, "-m", "camserve_cli", *line], capture_output=True, text=True, check=False, timeout=60
    )


def test_one_method_names_the_maps_by_their_images(server: Server, folder: Path, tmp_path: Path):
    given = (folder / "00.png", folder / "01.png", "--csv", tmp_path / "s.csv", "--npz", tmp_path / "m.npz")
    assert evaluate(server, *given, "--method", "grad-cam").returncode == 0
    with np.load(tmp_path / "m.npz") as maps:
        assert sorted(maps) == ["00.png", "01.png"]


def test_a_file_of_another_run_is_refused(server: Server, folder: Path, tmp_path: Path):
    given = (folder / "00.png", "--csv", tmp_path / "s.csv", "--method", "opti-cam", "--resume")
    first = evaluate(server, *given, "--param", "steps=2")
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "s.csv").read_bytes()
    for options, said in [
        (("--param", "steps=2", "--metric", "insertion"), "its metrics are average-drop, asked for are insertion"),
        (("--param", "steps=3"), "is there with steps 2, not 3"),
        (("--param", "steps=2", "--seed", 4), "is there with seed 0, not 4"),
    ]:
        again = evaluate(server, *given, *options)
        assert again.returncode == 1
        assert said in again.stderr
    assert (tmp_path / "s.csv").read_bytes() == before


def test_wrong_names_are_said_before_anything_is_written(server: Server, folder: Path, tmp_path: Path):
    given = (folder, "--csv", tmp_path / "s.csv")
    for options in (
        ("--method", "no-cam"),
        ("--method", "cam", "--metric", "no"),
        ("--method", "cam", "--model", "no"),
    ):
        ran = evaluate(server, *given, *options)
        assert (ran.returncode, ran.stderr[:15]) == (1, "error: there is")
    assert not (tmp_path / "s.csv").exists()


def test_metrics_of_localisation_take_boxes(server: Server, folder: Path, tmp_path: Path):
    given = (folder / "00.png", folder / "01.png", "--method", "cam", "--metric", "pointing-game")
    refused = evaluate(server, *given, "--csv", tmp_path / "s.csv")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: pointing-game needs to know where the target is: give --boxes")
    assert not (tmp_path / "s.csv").exists()
    (tmp_path / "boxes.csv").write_text("00.png,0,0,36,40\n01.png,35,39,36,40\n")
    ran = evaluate(server, *given, "--csv", tmp_path / "s.csv", "--boxes", tmp_path / "boxes.csv")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [float(row["pointing-game"]) for row in table(tmp_path / "s.csv")] == [1, 0]
    again = ("--csv", tmp_path / "s.csv", "--resume", "--boxes")
    assert evaluate(server, *given, *again, tmp_path / "boxes.csv").returncode == 0
    (tmp_path / "others.csv").write_text("00.png,0,0,36,39\n01.png,35,39,36,40\n")
    other = evaluate(server, *given, *again, tmp_path / "others.csv")
    assert other.returncode == 1
    assert "00.png by cam is there with boxes [[0.0, 0.0, 36.0, 40.0]], not [[0.0, 0.0, 36.0, 39.0]]" in other.stderr
    one = evaluate(server, given[0], *given[2:], "--boxes", tmp_path / "boxes.csv")
    assert re.search(r"pointing-game +1\b", one.stdout)


def test_wrong_usage_exits_with_2(server: Server, folder: Path, tmp_path: Path):
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
        assert evaluate(server, *wrong).returncode == 2, wrong
    missing = evaluate(server, image, "--method", "cam", "--labels", labels, *out)
    assert (missing.returncode, missing.stderr) == (1, f"error: No such file or directory: {labels}\n")


def test_ctrl_c_keeps_what_is_done(address, servicer, folder, tmp_path):
    def answer_the_first(context: Any) -> None:
        if len([each for each in servicer.requests if isinstance(each, pb.ExplainRequest)]) == 2:
            context.add_callback(servicer.cancelled.set)
            servicer.started.set()
            servicer.cancelled.wait(20)

    servicer.before = answer_the_first
    line = ["evaluate", str(folder), "--method", "opti-cam", "--metric", "insertion", "--address", address]
    process = subprocess.Popen(
        [sys.executable, "-m", "camserve_cli", *line, "--in-flight", "1", "--csv", str(tmp_path / "s.csv")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert servicer.started.wait(20)
    while (tmp_path / "s.csv").read_bytes().count(b"\n") < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert said == f"{tmp_path / 's.csv'} keeps what is done: the same command with --resume goes on\ncancelled\n"
    assert servicer.cancelled.wait(5)
    assert [row["image"][-6:] for row in table(tmp_path / "s.csv")] == ["00.png"]


def test_progress_goes_to_stderr_and_the_means_to_stdout(address, servicer, folder, tmp_path):
    def refuse_the_third(context: Any) -> None:
        if len([each for each in servicer.requests if isinstance(each, pb.ExplainRequest)]) == 3:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "un-\nreadable")

    servicer.before = refuse_the_third
    options = ["--method", "opti-cam", "--method", "fake-cam", "--metric", "insertion", "--in-flight", "1"]
    line = ["evaluate", str(folder), *options, "--csv", str(tmp_path / "s.csv"), "--address", address]
    result = CliRunner().invoke(app, line, env={"COLUMNS": "200", "FORCE_COLOR": "1"})
    plain, said = (re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text) for text in (result.stdout, result.stderr))
    assert result.exit_code == 1
    assert "24/24 1 failed" in said
    assert f"error: {folder / '01.png'}, first, opti-cam: un-\nreadable" in said
    assert [line.split() for line in plain.splitlines()] == [
        ["model", "method", "done", "insertion", "failed"],
        ["first", "fake-cam", "12", "0.25"],
        ["first", "opti-cam", "11", "0.25", "1"],
    ]
    [row] = [row for row in table(tmp_path / "s.csv") if row["error"]]
    assert (row["error"], row["target"], row["receipt"]) == ("un- readable", "", "")
