"""Bulk runs on a real cluster of two nodes: lost nodes, killed drivers, and values that equal those of a server."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pyarrow import parquet

import camserve
from camserve.batches import Variant
from camserve_ray import bulk
from camserve_server.config import Config, ModelConfig
from tests.conftest import serving
from tests.processes import LIMIT_S, environment
from tests.ray.cluster import Node, cluster
from tests.ray.held_net import FOLDER
from tests.ray.test_bulk_engine import encoded, write_parquet, write_tar

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

METHODS = ("grad-cam", "opti-cam:steps=2")
METRICS = ("insertion", "average-drop")
CONFIG = """
[[models]]
name = "held"
source = "python:tests.ray.held_net:held_net"
input_size = [32, 32]
batch_size = 4
"""
# The command with parts of three rows instead of a thousand, so that a killed run leaves some. It reports each result.
COMMAND = (
    "from camserve_ray.bulk import output, run; output.PART_ROWS = 3; run.REPORT_S = 0; "
    "from camserve_cli.__main__ import main; main()"
)
WHITE = 6  # the images at which the engines can be held; the others come first


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an archive, a Parquet file, image files of which one is broken, and white images at the end."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tar(folder / "a.tar", {f"{seed}.png": encoded(seed) for seed in range(4)})
    write_parquet(folder / "b.parquet", image=[encoded(seed) for seed in range(4, 8)])
    for seed in range(8, 12):
        (folder / f"c{seed:02}.png").write_bytes(encoded(seed))
    (folder / "d.png").write_bytes(b"no image")
    for number in range(WHITE):
        PIL.Image.fromarray(np.full((40, 36, 3), 255 - number, np.uint8)).save(folder / f"e{number}.png")
    (folder / "camserve.toml").write_text(CONFIG)
    return folder


def contents(inputs: Path) -> dict[str, bytes]:
    """Return the readable images by their names in the output."""
    files = {str(path): path.read_bytes() for path in sorted(inputs.glob("[ce]*.png"))}
    files |= {f"{inputs}/a.tar/{seed}.png": encoded(seed) for seed in range(4)}
    return files | {f"{inputs}/b.parquet/{seed - 4}": encoded(seed) for seed in range(4, 8)}


def started(inputs: Path, out: Path, address: str, **variables: str) -> subprocess.Popen[str]:
    """Start a run with two images in progress on each engine."""
    options = ["evaluate", inputs, "--ray", address, "--out", out, "--config", inputs / "camserve.toml"]
    methods = [text for method in METHODS for text in ("--method", method)]
    metrics = [text for metric in METRICS for text in ("--metric", metric)]
    line = [*options, *methods, *metrics, "--in-flight", 2, "--cpus-per-engine", 1]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(COLUMNS="200", **variables),
    )


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of an output folder; empty if there are none."""
    parts = sorted((out / "scores").glob("part-*.parquet"))
    return [row for part in parts for row in parquet.read_table(part).to_pylist()]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds. On a busy machine, a cluster and its engines need minutes to start."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.05)


class Hold:
    """Holds the engines of nodes at white images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = set[Path]()

    def start(self, *nodes: Node) -> None:
        for node in nodes:
            (self.folder / f"hold-{node.mark}").touch()

    def wait(self, node: Node, run: subprocess.Popen[str]) -> None:
        """Wait until another engine of the node is held than in earlier calls.

        The engine of a killed driver may be held a little longer.
        """
        found = set[Path]()

        def is_held() -> bool:
            found.update(self.folder.glob(f"held-{node.mark}-*"))
            return not found <= self.seen or run.poll() is not None

        wait_until(is_held)
        assert run.poll() is None, run.communicate()[1]
        self.seen |= found

    def end(self, node: Node) -> None:
        (self.folder / f"hold-{node.mark}").unlink()


def test_lost_node_and_killed_driver_leave_each_image_exactly_once(inputs: Path, tmp_path: Path) -> None:
    out, hold = tmp_path / "out", Hold(tmp_path)
    with cluster(head_cpus=1, worker_cpus=1, **{FOLDER: str(tmp_path)}) as running:
        hold.start(running.head, running.worker)
        first = started(inputs, out, running.address)
        for node in (running.head, running.worker):
            hold.wait(node, first)
        wait_until(lambda: bool(rows_of(out)))
        first.send_signal(signal.SIGKILL)
        assert first.wait(LIMIT_S) == -signal.SIGKILL
        first.communicate()
        kept = [row for row in rows_of(out) if not row["error"]]
        assert 3 <= len(kept) < 2 * (len(contents(inputs)) - WHITE) + 1

        second = started(inputs, out, running.address, FORCE_COLOR="1")  # shows the progress bar without a terminal
        hold.wait(running.worker, second)  # its engine evaluates an image now
        hold.end(running.head)  # not earlier: the head could evaluate all images before the worker has started
        running.worker.kill()
        _, stderr = second.communicate(timeout=LIMIT_S)
    assert second.returncode == 1, "one image is broken"
    assert "engines were lost" in stderr
    assert stderr.count("error: ") == 1, stderr
    assert stderr.endswith(" (1 more: UNREADABLE_IMAGE)\n"), stderr
    progress = re.findall(r"(\d+)/(\d+)\x1b.* failed", stderr)
    total = str(2 * (len(contents(inputs)) + 1))
    assert progress[0] == (str(len(kept)), total)
    assert progress[-1] == (total, total)

    rows = rows_of(out)
    by_key = {(row["image"], row["method"]): row for row in rows}
    assert len(by_key) == len(rows) == 2 * (len(contents(inputs)) + 1), "each image is in the output exactly once"
    assert [by_key[row["image"], row["method"]] for row in kept] == kept, "finished images are not evaluated again"
    assert [name for (name, _), row in by_key.items() if row["error"]] == [str(inputs / "d.png")] * 2
    check_values(inputs, out, by_key)

    # A finished folder needs no cluster, unless images have failed.
    (inputs / "d.png").rename(tmp_path / "d.png")
    summary = bulk.evaluate(
        inputs,
        out,
        methods=[Variant(METHODS[0], "grad-cam"), Variant(METHODS[1], "opti-cam", {"steps": 2})],
        metrics=METRICS,
        config=inputs / "camserve.toml",
        address="127.0.0.1:1",
    )
    assert summary == bulk.BulkSummary(maps=2 * len(contents(inputs)), failed=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_and_keep_the_finished_images(inputs: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, hold = tmp_path / "out", tmp_path / "hold-None"  # nodes that Ray itself starts have no marks
    hold.touch()
    run = started(inputs, out, "local", **{FOLDER: str(tmp_path)})
    try:
        wait_until(lambda: run.poll() is not None or (bool(rows_of(out)) and any(tmp_path.glob("held-None-*"))))
        assert run.poll() is None, run.communicate()[1]
        before = rows_of(out)
        run.send_signal(number)
        _, stderr = run.communicate(timeout=LIMIT_S)
    finally:
        hold.unlink()
        run.kill()
    assert run.returncode == 128 + number
    assert f"{out} contains the finished images; continue with the same command" in stderr
    assert "Traceback" not in stderr
    assert "***" not in stderr, "Ray aborts no process"
    assert re.search(rf"^{len(before)} of \d+ maps, \d+ failed$", stderr, re.MULTILINE), "no terminal has a bar"
    keys = [(row["image"], row["method"]) for row in rows_of(out)]
    assert len({*keys}) == len(keys) >= len(before)
    assert not [*out.rglob(".part*")]


def check_values(inputs: Path, out: Path, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Compare rows and maps with those of a server, bit for bit."""
    images = contents(inputs)
    model = ModelConfig(name="held", source="python:tests.ray.held_net:held_net", input_size=(32, 32), batch_size=4)
    with (
        serving(Config(listen="127.0.0.1:0", device="cpu", models=[model])) as server,
        camserve.Client(server.address) as client,
    ):
        for result in client.evaluate_many(
            images.values(),
            methods=[Variant(METHODS[0], "grad-cam"), Variant(METHODS[1], "opti-cam", {"steps": 2})],
            metrics=METRICS,
        ):
            row = rows[[*images][result.index], result.method]
            assert {name: row[name] for name in METRICS} == {
                name: float(score) for name, score in result.scores.items()
            }
            assert (row["target"], row["probability"]) == (result.target.index, result.target.probability)
            receipt = camserve.Receipt.from_json(row["receipt"])
            assert receipt.map_digests == result.receipt.map_digests
            assert receipt.batch_sizes == result.receipt.batch_sizes
            with np.load(out / row["map_file"]) as maps:
                assert np.array_equal(maps[row["map_name"]], result.saliency)
