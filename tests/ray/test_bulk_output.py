"""Output folders of bulk runs that are damaged, full, locked, or of a run with other settings."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

import camserve
from camserve_ray import bulk
from camserve_ray.bulk import BulkImage, start
from camserve_ray.bulk.output import Output
from camserve_server.config import Config
from tests.ray.test_bulk_engine import OPTIONS, TINY, images_in, row_of

IMAGE = BulkImage("a", "/a.png", "file")


def with_model(changes: dict[str, Any]) -> Config:
    return Config(models=[TINY.model_copy(update=changes)])


def with_results(folder: Path) -> None:
    """Write an output folder with the row of an image."""
    start([IMAGE], folder, **OPTIONS).close()
    output = Output(folder, OPTIONS["metrics"], json.loads((folder / "run.json").read_text()))
    output.add(row_of("b"))
    output.close()


def junk(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xff junk")


def foreign(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table({"x": [1]}), path)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("run.json", junk, r"run\.json is damaged .*; choose another folder"),
        ("run.json", lambda path: path.write_text(""), r"run\.json is damaged"),
        ("run.json", lambda path: path.write_text("[]"), r"run\.json is damaged \(no object\)"),
        (
            "scores/part-00000.parquet",
            junk,
            r"part-00000\.parquet is damaged .*; remove it to evaluate",
        ),
        ("scores/part-00000.parquet", foreign, r"part-00000\.parquet has other columns than this run"),
    ],
)
def test_damaged_files_are_named(file: str, damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with_results(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(camserve.InvalidArgument, match=message):
        start([IMAGE], tmp_path, **OPTIONS)


def test_files_with_other_names_are_no_parts(tmp_path: Path) -> None:
    with_results(tmp_path)
    junk(tmp_path / "scores" / "part-of-mine.parquet")
    start([IMAGE], tmp_path, **OPTIONS).close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"config": Config(models=[TINY.model_copy(update={"precision": ("bf16",)})])},
            r"model_settings\.tiny\.precision",
        ),
        ({"config": with_model({"mean": (0.1, 0.2, 0.3)})}, r"model_settings\.tiny\.mean"),
        (
            {"config": Config(models=[TINY.model_copy(update={"input_size": (9, 9)})])},
            r"model_settings\.tiny\.input_size",
        ),
        ({"image_column": "other"}, 'image_column "image"; this run uses "other"'),
        ({"budget": 9}, "budget null; this run uses 9"),
        ({"maps": False}, "maps true; this run uses false"),
        ({"metrics": ["deletion"]}, "metrics"),
        ({"methods": [replace(OPTIONS["methods"][0], seed=1)]}, "methods"),
    ],
)
def test_other_settings_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with_results(tmp_path)
    with pytest.raises(camserve.InvalidArgument, match=message):
        start([IMAGE], tmp_path, **{**OPTIONS, **changes})
    start([IMAGE], tmp_path, **OPTIONS).close()


def test_refused_settings_can_be_corrected_in_the_same_folder(tmp_path: Path) -> None:
    wrong = [replace(OPTIONS["methods"][0], parameters={"nope": 1})]  # which only the engines refuse
    start([IMAGE], tmp_path, **{**OPTIONS, "methods": wrong}).close()
    (tmp_path / "run.json").write_text("{")
    start([IMAGE], tmp_path, **OPTIONS).close()
    assert json.loads((tmp_path / "run.json").read_text())["methods"][0]["parameters"] == {}


def test_batch_sizes_and_places_of_weights_may_change(tmp_path: Path) -> None:
    with_results(tmp_path)
    moved = with_model({"batch_size": 2, "weights": "/elsewhere/weights.pt"})
    start([IMAGE], tmp_path, **{**OPTIONS, "config": moved}).close()


def test_full_disk_is_an_error_that_names_the_file_and_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(tmp_path, [], {})
    output.add(row_of("a", map_value=0.5))
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            output.flush()
    assert caught.value.filename == str(tmp_path / "maps" / "part-00000.npz")
    assert not [*(tmp_path / "maps").iterdir()]
    output.close()
    assert images_in(tmp_path) == ["a"]


def test_file_system_without_locks_is_another_error_than_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="cannot lock the folder"):
        Output(tmp_path, [], {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "there are no methods"),
        ({"in_flight": 0}, "in_flight is 0; expected at least 1"),
        ({"cpus_per_engine": -1}, "cpus_per_engine is -1; expected at least 1"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(camserve.InvalidArgument, match=message):
        start([IMAGE], tmp_path / "out", **{**OPTIONS, **changes})
    assert not (tmp_path / "out").exists()


def test_no_images_are_refused_and_repeated_names_count_once(tmp_path: Path) -> None:
    with pytest.raises(camserve.InvalidArgument, match="there are no images"):
        bulk.evaluate([], tmp_path, methods="grad-cam")
    run = start([IMAGE], tmp_path, **{**OPTIONS, "models": ["tiny", "tiny"], "metrics": ["insertion", "insertion"]})
    run.close()
    assert (run.count, run.done) == (2, 0)
