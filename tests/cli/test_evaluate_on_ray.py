"""Options of `camserve evaluate --ray`; tests/ray contains runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from camserve_cli.app import app
from camserve_cli.study import image_files
from camserve_cli.study.score_csv import ScoreCsv
from camserve_ray.bulk import files
from camserve_ray.bulk.rows import schema
from tests.ray.test_bulk_engine import write_parquet


def run(*arguments: Any) -> Result:
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, ["evaluate", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray", "auto", "--method", "cam"], "--ray needs --out"),
        (["--ray", "auto", "--out", "out"], "--ray needs --method"),
        (["--out", "out", "--method", "cam"], "--out needs --ray"),
        (["--image-column", "picture", "--method", "cam"], "--image-column needs --ray"),
        *(
            (["--ray", "auto", "--out", "out", "--method", "cam", *option], f"{option[0]} cannot be used with --ray")
            for option in (
                ["--csv", "x.csv"],
                ["--npz", "x.npz"],
                ["--report", "x.html"],
                ["--json"],
                ["--saliency", "x.npy"],
                ["--address", "127.0.0.1:50051"],
                ["--map-dtype", "float32"],
                ["--per-layer", "cam"],
                ["--priority", "low"],
                ["--timeout", "5"],
            )
        ),
        (
            ["--ray", "auto", "--out", "o", "--method", "cam", "--target", "1", "--target-column", "x"],
            "--target cannot",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: list[str], message: str) -> None:
    result = run("image.png", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_columns_and_image_files_are_those_of_other_runs() -> None:
    assert files.SUFFIXES == image_files.SUFFIXES
    metrics = ["insertion", "deletion"]
    assert schema(metrics).names == [
        *ScoreCsv(Path("x.csv"), metrics).columns,
        "requested_target",
        "map_file",
        "map_name",
    ]


def test_settings_of_a_server_in_the_environment_are_ignored(tmp_path: Path) -> None:
    runner = CliRunner(env={"CAMSERVE_ADDRESS": "127.0.0.1:1", "CAMSERVE_USE_TLS": "1"})
    line = ["evaluate", str(tmp_path), "--ray", "127.0.0.1:1", "--out", str(tmp_path / "out"), "--method", "cam"]
    result = runner.invoke(app, line)
    assert result.exit_code == 1
    assert "contains no images; expected" in result.stderr


def test_missing_cluster_and_labels_for_archives_are_errors(tmp_path: Path) -> None:
    images = write_parquet(tmp_path / "a.parquet", image=[b"x"])
    options = ["--ray", "127.0.0.1:1", "--out", tmp_path / "out", "--method", "cam"]
    result = run(images, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no Ray cluster at '127.0.0.1:1'; start one with `ray start --head`" in result.stderr
    (tmp_path / "labels.csv").write_text("a.parquet,1\n")
    result = run(images, *options, "--labels", tmp_path / "labels.csv")
    assert result.exit_code == 1
    assert "give --target-column" in result.stderr
