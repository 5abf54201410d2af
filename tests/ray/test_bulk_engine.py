"""The parts of a bulk run that need no cluster: lists of images, engines and the output folder."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import PIL.Image
import pyarrow
import pytest
from pyarrow import parquet

import camserve
import camserve_dicom
from camserve.batches import Variant
from camserve_cli.study import score_csv
from camserve_ray.bulk import BulkImage, BulkRun, find_images, start
from camserve_ray.bulk.cluster import Placement, place, reporting_wait
from camserve_ray.bulk.engine import BulkSpec, Chunk, ImageEvaluator
from camserve_ray.bulk.output import Output
from camserve_ray.bulk.reading import ImageReader
from camserve_ray.bulk.rows import Row, failed_row
from camserve_server.config import CacheConfig, Config, ModelConfig, TokenConfig
from camserve_server.service.server import Server
from tests.dicom import samples
from tests.processes import LIMIT_S

TINY = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
SPEC = BulkSpec(
    [Variant("grad-cam", "grad-cam"), Variant("opti-cam:steps=2", "opti-cam", {"steps": 2})],
    ["insertion", "average-drop"],
    ["tiny"],
)


def encoded(seed: int) -> bytes:
    """Return a small PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, rows_per_group: int = 2, **columns: list[Any]) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)
    return path


@pytest.fixture(scope="module")
def evaluator() -> Iterator[ImageEvaluator]:
    made = ImageEvaluator(Config(device="cpu", models=[TINY]), SPEC)
    assert made.refused is None
    yield made
    made.service.close()


def evaluated(evaluator: ImageEvaluator, images: list[BulkImage]) -> dict[tuple[str, str], Row]:
    """Return the rows of images by all methods, by (name of the image, method)."""
    chunk = Chunk([(image, [("tiny", each.label) for each in SPEC.variants]) for image in images])
    found = [row for rows in evaluator.results(chunk) for row in rows]
    by_key = {(row.values["image"], row.values["method"]): row for row in found}
    assert len(by_key) == len(found)
    return by_key


# ---- images ---------------------------------------------------------------------------------------------------------


def test_folder_is_searched_for_all_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.JPG").write_bytes(b"")
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "readme.txt").write_text("no image")
    (tmp_path / "1.2.840.1").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "1.2.840.2").write_bytes(bytes(128) + b"text")
    (tmp_path / "scan.dcm").write_bytes(b"")
    write_tar(tmp_path / "c.tar", {"x.png": b"a", "y.cls": b"1", "y.seg.jpg": b"bc"})
    write_parquet(tmp_path / "d.parquet", image=[b"1", b"2", b"3"])
    found = find_images([tmp_path, tmp_path / "1.png", tmp_path / "none.png"], target=3)
    assert [(each.name.removeprefix(f"{tmp_path}/"), each.kind) for each in found] == [
        ("1.2.840.1", "dicom"),
        ("1.png", "file"),
        ("b/2.JPG", "file"),
        ("c.tar/x.png", "tar"),
        ("c.tar/y.seg.jpg", "tar"),
        ("d.parquet/0", "parquet"),
        ("d.parquet/1", "parquet"),
        ("d.parquet/2", "parquet"),
        ("scan.dcm", "dicom"),
        ("none.png", "file"),
    ]
    assert {each.target for each in found} == {3}
    reader = ImageReader("image")
    assert [reader.read(each) for each in found[3:8]] == [b"a", b"bc", b"1", b"2", b"3"]


def test_names_and_targets_come_from_columns_and_archives(tmp_path: Path) -> None:
    structs = [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": "x"}]
    path = write_parquet(tmp_path / "d.parquet", picture=structs, id=["one", "two"], label=[3, 4])
    found = find_images([path], image_column="picture", name_column="id", target_column="label")
    assert [(each.name, each.target) for each in found] == [("one", 3), ("two", 4)]
    assert [ImageReader("picture").read(each) for each in found] == [b"1", b"2"]
    path = write_tar(
        tmp_path / "c.tar", {"a/1.png": b"x", "a/1.cls": b"7\n", "a/2.cls": b"tabby, cat", "a/2.png": b"y"}
    )
    assert [each.target for each in find_images([path], target_column="cls")] == [7, "tabby, cat"]


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    images = write_parquet(tmp_path / "images.parquet", image=[b"1", b"2"], id=["a", "a"], label=["x", None])
    texts = write_parquet(tmp_path / "texts.parquet", image=["a"])
    archive = write_tar(tmp_path / "a.tar", {"1.png": b"x", "2.png": b"y", "1.cls": b"0"})
    packed = write_tar(tmp_path / "packed.tar", {"1.png": b"x"}, "w:gz")
    text = tmp_path / "text.parquet"
    text.write_text("no parquet")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (images, {"image_column": "picture"}, "has no column 'picture'; it has image, id, label"),
        (images, {"name_column": "id"}, "two images have the name a"),
        (images, {"target_column": "label"}, "the target of .*/1 is None"),
        (texts, {}, "has the type string; expected binary"),
        (archive, {"target_column": "cls"}, "the target of .*2.png is ''"),
        (packed, {}, "not an uncompressed tar archive"),
        (text, {}, "is not a Parquet file"),
        (tmp_path / "empty", {}, "contains no images"),
    ]
    for path, options, message in cases:
        with pytest.raises(camserve.InvalidArgument, match=message):
            find_images([path], **options)


@pytest.mark.parametrize("out", [".", "results", "linked"])
def test_scores_of_an_earlier_run_are_no_images(tmp_path: Path, out: str) -> None:
    (tmp_path / "linked").symlink_to("deep/results")
    for name in ("a.png", "b/scores/c.png", "deep/d.png", "results/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "deep" / "results").mkdir()
    before = find_images([tmp_path], out=tmp_path / out)
    assert len(before) == 4
    output = Output(tmp_path / out, [], {})
    output.add(row_of("a"))
    output.close()
    assert find_images([tmp_path], out=tmp_path / out) == before


# ---- engines --------------------------------------------------------------------------------------------------------


def test_all_kinds_of_images_have_the_values_of_a_server(
    evaluator: ImageEvaluator, server: Server, tmp_path: Path
) -> None:
    files = {f"{seed}.png": encoded(seed) for seed in range(3)}
    scan = tmp_path / "scan.dcm"
    scan.write_bytes(samples.data_of(samples.image(samples.ramp())))
    (tmp_path / "0.png").write_bytes(files["0.png"])
    write_tar(tmp_path / "c.tar", {"1.png": files["1.png"]})
    write_parquet(tmp_path / "d.parquet", image=[files["2.png"]])
    images = [*find_images([tmp_path]), replace(find_images([tmp_path / "0.png"])[0], name="targeted", target=2)]
    rows = evaluated(evaluator, images)
    pixels = {"0.png": files["0.png"], "c.tar/1.png": files["1.png"], "d.parquet/0": files["2.png"]}
    contents: dict[str, Any] = {f"{tmp_path}/{name}": data for name, data in pixels.items()}
    contents |= {str(scan): camserve_dicom.read(scan).pixels, "targeted": files["0.png"]}
    assert {name for name, _ in rows} == set(contents)
    with camserve.Client(server.address) as client:
        for result in client.evaluate_many(
            contents.values(),
            methods=SPEC.variants,
            metrics=SPEC.metrics,
            models="tiny",
            labels=[2 if name == "targeted" else None for name in contents],
        ):
            row = rows[[*contents][result.index], result.method]
            assert row.values["error"] == ""
            assert row.saliency is not None
            assert np.array_equal(row.saliency, result.saliency), "maps are equal bit for bit"
            assert {name: row.values[name] for name in SPEC.metrics} == {
                name: float(score) for name, score in result.scores.items()
            }
            assert (row.values["target"], row.values["probability"]) == (
                result.target.index,
                result.target.probability,
            )
            receipts = [json.loads(row.values["receipt"]), json.loads(result.receipt.to_json())]
            for receipt in receipts:
                del receipt["request_id"]
            assert receipts[0] == receipts[1]
            assert row.values["rows"] == result.cost.rows


def test_failed_images_have_the_errors_of_a_server(evaluator: ImageEvaluator, server: Server, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    PIL.Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "deep.tif")
    (tmp_path / "scan.dcm").write_bytes(b"no DICOM")
    write_parquet(tmp_path / "d.parquet", image=[None, encoded(0)])
    (tmp_path / "fine.png").write_bytes(encoded(1))
    images = [*find_images([tmp_path, tmp_path / "none.png"])]
    unknown = replace(images[-3], name="unknown class", target="no such class")
    undecodable = Path(os.fsdecode(bytes(tmp_path) + b"/\xff.png"))
    rows = evaluated(evaluator, [*images, unknown, *find_images([undecodable])])
    assert len(rows) == 2 * 9
    errors = {name.removeprefix(f"{tmp_path}/"): row for (name, method), row in rows.items() if method == "grad-cam"}
    with camserve.Client(server.address) as client:
        for name in ("broken.png", "deep.tif", "none.png"):
            [result] = client.evaluate_many([tmp_path / name], methods="grad-cam", metrics=["insertion"], models="tiny")
            assert result.error is not None
            assert errors[name].values["error"] == score_csv.failure_text(result.error)
            assert errors[name].saliency is None
    assert errors["broken.png"].reason == "UNREADABLE_IMAGE"
    assert errors["scan.dcm"].reason == "NOT_DICOM"
    assert errors["d.parquet/0"].values["error"] == "the column 'image' is empty in this row"
    assert errors["unknown class"].values["error"] == "tiny has no labels; give the index of the class"
    assert errors["unknown class"].values["requested_target"] == "no such class"
    assert errors["\\udcff.png"].values["error"] == f"No such file or directory: {tmp_path}/\\udcff.png"
    output = Output(tmp_path / "out", SPEC.metrics, {})
    for row in rows.values():
        output.add(row)
    output.close()
    assert len(images_in(tmp_path / "out")) == len(rows)
    assert errors["d.parquet/1"].values["error"] == errors["fine.png"].values["error"] == ""


def test_settings_that_fit_no_image_are_refused_once() -> None:
    for model, spec, message in [
        (TINY, replace(SPEC, variants=[Variant("x", "grad-cam", layers=["none"])]), "none"),
        (TINY, replace(SPEC, variants=[Variant("x", "rise")], budget=1), "the budget is 1"),
        (TINY, replace(SPEC, budget=9), "of them for metrics, and cannot stop early; the budget is 9"),
        (TINY, replace(SPEC, variants=[Variant("x", "rise", {"masks": 0})]), "masks is 0"),
        (TINY, replace(SPEC, variants=[Variant("x", "rise", seed=-1)]), "seed is -1"),
        (TINY, replace(SPEC, targets=[99999]), "tiny has no class 99999; expected an index from 0 to"),
        (TINY, replace(SPEC, targets=["cat", -1]), "tiny has no labels; give the index of the class"),
        (TINY.model_copy(update={"source": "python:tests.nets:missing"}), SPEC, "models.tiny.source"),
    ]:
        made = ImageEvaluator(Config(device="cpu", models=[model]), spec)
        made.service.close()
        assert made.refused is not None
        assert message in made.refused.message
    for spec in (
        replace(SPEC, targets=["cat", -1, 0]),
        replace(SPEC, targets=[99999, None]),
        replace(SPEC, metrics=["pointing-game"]),
    ):
        made = ImageEvaluator(Config(device="cpu", models=[TINY]), spec)
        made.service.close()
        assert made.refused is None, "some images can be evaluated"
    made = ImageEvaluator(Config(device="cuda:99", models=[TINY]), SPEC)
    assert made.refused is not None
    assert "device: cuda:99" in made.refused.message


# ---- output ---------------------------------------------------------------------------------------------------------


def row_of(image: str, digest: str = "a", map_value: float | None = None) -> Row:
    receipt = json.dumps({"model_digest": digest})
    values = {"image": image, "model": "m", "method": "cam", "requested_target": "", "boxes": "", "error": ""}
    return Row(
        {**values, "target": 1, "receipt": receipt},
        None if map_value is None else np.full((2, 2), map_value, np.float32),
    )


def images_in(folder: Path) -> list[str]:
    return sorted(parquet.read_table(folder / "scores")["image"].to_pylist())


def test_output_keeps_complete_parts_and_drops_failed_rows(tmp_path: Path) -> None:
    output = Output(tmp_path / "out", ["insertion"], {"budget": None})
    output.add(row_of("a", map_value=0.25))
    output.add(failed_row(("b", "m", "cam"), "broken", "BROKEN", BulkImage("b", "/b", "file")))
    output.flush()
    output.add(row_of("c"))
    assert images_in(tmp_path / "out") == ["a", "b"], "a killed run has no incomplete part"
    output.close()
    assert images_in(tmp_path / "out") == ["a", "b", "c"]
    (tmp_path / "out" / "maps" / "part-00002.npz").write_bytes(b"of a killed run")

    output = Output(tmp_path / "out", ["insertion"], {"budget": None})
    assert output.finished == {("a", "m", "cam"): ("", ""), ("c", "m", "cam"): ("", "")}
    output.add(row_of("b", map_value=0.5))
    output.close()
    rows = parquet.read_table(tmp_path / "out" / "scores").to_pylist()
    assert [row["image"] for row in rows] == ["a", "c", "b"]
    for row, value in zip(rows, (0.25, None, 0.5), strict=True):
        assert (row["map_file"] is None) == (value is None)
        if value is not None:
            maps = np.load(tmp_path / "out" / row["map_file"])
            assert np.array_equal(maps[row["map_name"]], np.full((2, 2), value))


def test_killed_run_leaves_a_readable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: pyarrow.Table, file: BinaryIO) -> None:
        file.write(b"PAR1 half")
        raise KeyboardInterrupt

    output = Output(tmp_path, [], {})
    output.add(row_of("a"))
    output.flush()
    output.add(row_of("b"))
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "write_table", killed)
        with pytest.raises(KeyboardInterrupt):
            output.flush()
    assert len([*(tmp_path / "scores").iterdir()]) == 2, "the folder contains half a file"
    assert images_in(tmp_path) == ["a"]
    output.close()
    assert images_in(tmp_path) == ["a", "b"]


def test_output_of_another_run_is_refused(tmp_path: Path) -> None:
    output = Output(tmp_path, ["insertion"], {"metrics": ["insertion"]})
    with pytest.raises(camserve.InvalidArgument, match="another run writes to"):
        Output(tmp_path, ["insertion"], {"metrics": ["insertion"]})
    output.add(row_of("a"))
    with pytest.raises(camserve.InvalidArgument, match="the weights of m have the digest b"):
        output.add(row_of("b", digest="b"))
    output.close()
    with pytest.raises(camserve.InvalidArgument, match=r'has results with metrics \["insertion"\]; this run uses'):
        Output(tmp_path, ["deletion"], {"metrics": ["deletion"]})
    output = Output(tmp_path, ["insertion"], {"metrics": ["insertion"]})
    with pytest.raises(camserve.InvalidArgument, match="the weights of m have the digest b"):
        output.add(row_of("b", digest="b"))
    output.close()


def test_large_parts_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camserve_ray.bulk.output.PART_ROWS", 2)
    output = Output(tmp_path, [], {})
    for name in "abc":
        output.add(row_of(name))
    assert images_in(tmp_path) == ["a", "b"]
    output.close()
    assert len([*(tmp_path / "scores").iterdir()]) == 2


# ---- checks before a run --------------------------------------------------------------------------------------------


OPTIONS: dict[str, Any] = {
    "methods": SPEC.variants,
    "metrics": ["insertion"],
    "models": [],
    "config": Config(models=[TINY]),
    "budget": None,
    "maps": True,
    "image_column": "image",
    "address": "auto",
    "in_flight": 2,
    "cpus_per_engine": None,
}


def test_mistakes_are_found_before_a_cluster_is_needed(tmp_path: Path) -> None:
    image = BulkImage("a", "/a.png", "file")
    cases: list[tuple[dict[str, Any], type[camserve.CamserveError], str]] = [
        ({"models": ["large"]}, camserve.NotFound, "no model 'large'; there are: tiny"),
        ({"methods": [Variant("x", "cam-cam")]}, camserve.NotFound, "no method 'cam-cam'"),
        ({"methods": [SPEC.variants[0]] * 2}, camserve.InvalidArgument, "several methods have the label grad-cam"),
        ({"metrics": ["beauty"]}, camserve.NotFound, "no metric 'beauty'"),
        ({"metrics": ["pointing-game"]}, camserve.InvalidArgument, "needs the position of the target"),
        ({"config": tmp_path / "none.toml"}, camserve.InvalidArgument, "none.toml"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            start([image], tmp_path / "out", **{**OPTIONS, **changes})
    with pytest.raises(camserve.InvalidArgument, match="not UTF-8"):
        start([replace(image, target="\udcff")], tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_rows_of_other_targets_and_boxes_are_refused(evaluator: ImageEvaluator, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(0))
    images = [BulkImage(name, str(file), "file", target=target) for name, target in (("none", None), ("two", 2))]
    images.append(BulkImage("box", str(file), "file", boxes=[(0, 0, 9, 9)]))
    run: BulkRun = start(images, tmp_path / "out", **OPTIONS)
    run.close()
    output = Output(tmp_path / "out", ["insertion"], json.loads((tmp_path / "out" / "run.json").read_text()))
    for row in evaluated(evaluator, images).values():
        output.add(row)
    output.close()
    predicted = parquet.read_table(tmp_path / "out" / "scores").to_pylist()[0]["target"]
    run = start(images, tmp_path / "out", **OPTIONS)
    run.close()
    assert run.done == run.count == 6
    for image, message in [
        (replace(images[0], target=predicted), f"has target the predicted class; this run uses {predicted};"),
        (replace(images[0], target="cat"), "has target the predicted class; this run uses cat;"),
        (replace(images[1], target=None), "has target 2; this run uses the predicted class;"),
        (replace(images[1], target="cat"), "has target 2; this run uses cat;"),
        (replace(images[2], boxes=None), r"has boxes \[\[0.0, 0.0, 9.0, 9.0\]\]; this run uses none;"),
    ]:
        with pytest.raises(camserve.InvalidArgument, match=message):
            start([image], tmp_path / "out", **OPTIONS)


def test_engines_receive_no_secrets(tmp_path: Path) -> None:
    secrets = Config(
        models=[TINY],
        tokens=[TokenConfig(name="alice", sha256="ab" * 32)],
        cache=CacheConfig(redis_url="redis://user:secret@127.0.0.1:6379/0"),
        admin_listen="127.0.0.1:50999",
    )
    run = start([BulkImage("a", "/a.png", "file")], tmp_path, **{**OPTIONS, "config": secrets})
    run.close()
    sent = pickle.dumps(run._engine_config(Placement(1, 1, 0)))
    assert b"tiny" in sent
    for secret in (b"secret", b"ab" * 32, b"alice", b"50999"):
        assert secret not in sent


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(3, cpus=4, gpus=0), "waiting for CPUs.* 3 .* with 4 CPU.* each, and 2 CPU"),
        (Placement(2, cpus=0, gpus=1), "waiting for GPUs.* 2 .* with 1 GPU.* each, and 0 GPU"),
    ],
)
def test_wait_for_devices_is_reported(
    placement: Placement, message: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("camserve_ray.bulk.cluster.WAIT_REPORT_S", 0.001)
    calls, asked_again = iter([ConnectionError("the head node is lost"), None]), threading.Event()

    def free() -> dict[str, float]:
        try:
            if error := next(calls):
                raise error
        except StopIteration:
            asked_again.set()
        return {"CPU": 2.0}

    with caplog.at_level(logging.WARNING), reporting_wait(placement, free) as first_result:
        assert asked_again.wait(LIMIT_S)
        first_result.set()
    assert re.search(message, caplog.messages[0])


@pytest.mark.parametrize(
    ("settings", "cpus", "nodes", "expected"),
    [
        ({}, None, [{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}, {"CPU": 64}], Placement(8, 0, 1)),
        ({"device": "cpu"}, None, [{"CPU": 8, "GPU": 4}, {"CPU": 64}], Placement(18, 4, 0)),
        ({}, None, [{"CPU": 2}, {"CPU": 9}], Placement(5, 2, 0)),
        ({"threads": 3}, None, [{"CPU": 2}, {"CPU": 9}], Placement(3, 3, 0)),
        ({"threads": 3}, 8, [{"CPU": 2}, {"CPU": 9}], Placement(1, 8, 0)),
        ({}, 10, [{"CPU": 2}, {"CPU": 9}], "an engine needs 10 CPUs, but the largest node of the cluster has 9"),
        ({"device": "cpu:0,1"}, None, [{"CPU": 8, "GPU": 4}], Placement(2, 4, 0)),
        ({"device": "cuda"}, None, [{"CPU": 2}], "the run needs GPUs"),
        ({"device": "cuda:0,1"}, None, [{"CPU": 2}], "the run needs GPUs"),
        ({"device": "all"}, None, [{"CPU": 2}], "the run needs GPUs"),
    ],
)
def test_engines_are_placed_on_all_devices(
    settings: dict[str, Any], cpus: int | None, nodes: list[dict[str, float]], expected: Placement | str
) -> None:
    described = [{"Alive": True, "Resources": node} for node in nodes]
    described.append({"Alive": False, "Resources": {"CPU": 99, "GPU": 99}})
    if isinstance(expected, Placement):
        assert place(Config(**settings), cpus, described) == expected
        return
    with pytest.raises(camserve.InvalidArgument, match=expected):
        place(Config(**settings), cpus, described)
