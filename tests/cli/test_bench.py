"""`camserve bench` and the locustfile."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result

import camserve
from camserve_cli.app import app
from camserve_cli.load import batch_fill, stats
from camserve_server.config import Config, ModelConfig
from tests.cli.test_report import Outline
from tests.client.fake_server import Servicer, wait_until
from tests.conftest import serving
from tests.processes import CAMSERVE, LIMIT_S, completed, started
from tests.support import full_batches

ROOT = Path(__file__).parents[2]


def bench(*arguments: object) -> Result:
    line = ["bench", *map(str, arguments)]
    if "--duration" not in line:
        line += ["--duration", "0.5", "--warmup", "0.1"]
    return CliRunner().invoke(app, line, env={"COLUMNS": "200"})


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


@pytest.mark.slow
def test_mix_is_written_as_tables_csv_and_page(address: str, servicer: Servicer, photo: Path, tmp_path: Path) -> None:
    path, page = tmp_path / "out.csv", tmp_path / "out.html"
    ran = bench(
        *("--address", address, "--method", "fake-cam=3", "--method", "opti-cam=1:steps=2", "--image", photo),
        *("--rate", 60, "--csv", path, "--report", page, "--metric", "insertion", "--budget", 7, "--seed", 1),
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    requests = [each for each in servicer.requests if hasattr(each, "image")]
    assert {each.method.name for each in requests} == {"fake-cam", "opti-cam"}
    assert {(each.image.encoded, each.budget, each.top_k) for each in requests} == {(photo.read_bytes(), 7, 1)}
    assert {dict(each.method.parameters).get("steps") for each in requests} == {None, 2}
    rows = rows_of(path)
    assert 0 < len(rows) < len(requests), "the requests of the warm-up are left out"
    for row in rows:
        assert (row["rate"], row["code"], row["rows"]) == ("60", "OK", "12")
        assert 0 <= float(row["intended_s"]) < 0.5
        latency = 1e3 * (float(row["done_s"]) - float(row["intended_s"]))
        assert float(row["latency_ms"]) == pytest.approx(latency, abs=0.01)
    assert re.search(rf"^all +{len(rows)} +{len(rows)} ", ran.stdout, re.MULTILINE)
    assert re.search(r"^latency +opti-cam:steps=2 ", ran.stdout, re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(text)
    assert outline.wrong == []
    assert text.count("<svg") == 3
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    again = bench("--address", address, "--method", "fake-cam", "--csv", path)
    assert (again.exit_code, f"{path} exists" in again.stderr) == (1, True)


@pytest.mark.slow
def test_json_contains_the_whole_result(address: str) -> None:
    ran = bench(
        "--address", address, "--method", "fake-cam", "--in-flight", 2, "--json", "--duration", 0.5, "--warmup", 0
    )
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout)
    [every] = result["summaries"]
    assert every["answered"] == every["requests"] > 0
    assert every["rows_per_s"] == pytest.approx(12 * every["requests_per_s"])
    assert set(every["latency_ms"]) == {"p50", "p90", "p99", "p99.9", "max"}
    assert (result["load"]["load"], result["load"]["weights"]) == ("closed loop, 2 in flight", "sha256:0")
    assert (result["knee"], result["steps"], result["fill"]) == (None, [], None)


@pytest.mark.slow
def test_knee_of_a_server_that_answers_one_request_at_a_time(address: str, servicer: Servicer, tmp_path: Path) -> None:
    busy = threading.Lock()

    def before(_: object) -> None:
        with busy:
            time.sleep(0.04)

    page, path = tmp_path / "k.html", tmp_path / "k.csv"
    line = ("--method", "fake-cam", "--knee", "--p99", 0.25, "--rate", 80, "--arrivals", "constant", "--seed", 3)
    servicer.before = lambda context: before(context) if hasattr(servicer.requests[-1], "image") else None
    ran = bench(
        "--address", address, *line, "--duration", 0.6, "--warmup", 0, "--json", "--report", page, "--csv", path
    )
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout)
    met = {step["rate"]: step["met"] for step in result["steps"]}
    # 80 requests per second need 1.9 s of work in 0.6 s.
    assert met[80] is False
    assert result["steps"][0]["dropped"]
    assert result["steps"][0]["summary"]["errors"][stats.UNFINISHED] > 0
    assert result["knee"] == max((rate for rate in met if met[rate]), default=None)
    for step in result["steps"]:
        summary = step["summary"]
        answered = summary["answered"] == summary["requests"] and summary["latency_ms"]["p99"] <= 250
        assert step["met"] == answered, "of fewer than 100 requests, all must be answered in time"
    assert result["knee"] is None or result["knee"] < 40
    assert {float(row["rate"]) for row in rows_of(path)} == {float(f"{r:.6g}") for r in met}
    assert "Measured rates" in page.read_text(encoding="utf-8")
    assert ran.stderr.count("/s: p99 ") == len(met)


@pytest.mark.slow
def test_ctrl_c_ends_the_load_and_reports_the_results(address: str, servicer: Servicer, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    line = [*CAMSERVE, "bench", "--address", address, "--method", "fake-cam"]
    line += ["--duration", "500", "--warmup", "0", "--csv", str(path)]
    with started(line, stderr=subprocess.PIPE) as process:
        wait_until(lambda: len(servicer.requests) >= 50 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, err
    assert "note: interrupted before the end" in err
    assert re.search(r"^all +\d+ ", out, re.MULTILINE)
    assert len(rows_of(path)) >= 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--knee",), "--knee and --p99 must be given together"),
        (("--p99", 1), "--knee and --p99 must be given together"),
        (("--in-flight", 2, "--rate", 1), "a closed loop cannot be combined"),
        (("--method", "fake-cam=0"), "expected a number above 0"),
        (("--method", "fake-cam=x:a=1"), "expected a number above 0"),
        (("--method", "fake-cam=1", "--method", "fake-cam=2"), "two of the methods are the same"),
    ],
)
def test_contradictory_options_exit_with_status_2(options: tuple[Any, ...], message: str) -> None:
    ran = bench("--address", "127.0.0.1:1", *options)
    assert (ran.exit_code, message in ran.stderr) == (2, True), ran.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "none"), "error: there is no method 'none'; there are: opti-cam, poly-cam, fake-cam"),
        (("--method", "poly-cam"), "error: the model first cannot serve the method poly-cam: no such layers"),
        (("--method", "fake-cam", "--metric", "none"), "error: there is no metric 'none'"),
        (("--method", "fake-cam", "--model", "none"), "error: there is no model 'none'"),
        (("--method", "fake-cam", "--metrics-url", "http://127.0.0.1:1/metrics"), "Connection refused"),
    ],
)
def test_unknown_names_are_reported_before_the_load(
    address: str, servicer: Servicer, options: tuple[Any, ...], message: str
) -> None:
    ran = bench("--address", address, *options, "--duration", 600)
    assert (ran.exit_code, message in ran.stderr) == (1, True), ran.stderr
    assert not [each for each in servicer.requests if hasattr(each, "image")]


@pytest.mark.slow
def test_share_of_real_rows_is_read_from_the_server() -> None:
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    config = Config(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", models=[tiny])
    with full_batches(), serving(config) as server:
        url = f"http://{server.metrics_address}/metrics"
        assert batch_fill.read_counters(url) == (0, 0)
        line = [*CAMSERVE, "bench", "--address", server.address, "--method", "grad-cam"]
        line += ["--in-flight", "2", "--duration", "0.5", "--warmup", "0", "--metrics-url", url, "--json"]
        # A process of its own, because two event loops of gRPC in one process disturb each other.
        ran = completed(line)
        rows, padding = batch_fill.read_counters(url)
        with pytest.raises(camserve.InvalidArgument, match="has no metrics of a camserve server"):
            batch_fill.read_counters(f"http://{server.metrics_address}/metrics?name[]=camserve_ready")
    assert ran.returncode == 0, ran.stderr
    full = json.loads(ran.stdout)["fill"]
    assert rows / (rows + padding) == pytest.approx(full)
    # At most two requests of one row each share a batch of four.
    assert 0.25 <= full <= 0.5


def test_metrics_page_without_the_counters_raises() -> None:
    with pytest.raises(ValueError, match="camserve_rows_total"):
        batch_fill.parse_counters("# TYPE python_info gauge\npython_info 1.0\n")
    text = '# TYPE camserve_rows_total counter\ncamserve_rows_total{model="a b",lane="forward"} 6.0\n'
    text += 'camserve_rows_total{model="b",lane="forward"} 1e1\n# TYPE camserve_padding_rows_total counter\n'
    assert batch_fill.parse_counters(text) == (16, 0)
    assert batch_fill.fill_share((10, 0), (16, 2)) == 0.75
    assert batch_fill.fill_share((10, 1), (10, 1)) is None


# ---- locust ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed")
def test_locust_reports_calls_and_errors(address: str, servicer: Servicer) -> None:
    calls = itertools.count()

    def before(context: grpc.ServicerContext) -> None:
        if next(calls) % 2 == 0:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such thing")

    servicer.before = before
    # In a process of its own, because locust patches the standard library.
    line = [shutil.which("locust", path=str(Path(sys.executable).parent)) or "locust", "--headless", "--host", address]
    line += ["-f", str(ROOT / "examples" / "locustfile.py"), "-u", "2", "-r", "2", "-t", f"{LIMIT_S}s", "--json"]
    with started(line, stderr=subprocess.PIPE) as process:
        wait_until(lambda: len(servicer.requests) >= 6 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, err
    rows = json.loads(out)
    count, failed = (sum(row[name] for row in rows) for name in ("num_requests", "num_failures"))
    assert 3 <= count <= len(servicer.requests)
    assert 1 <= failed < count
    assert {row["method"] for row in rows} == {"Explain"}
    assert {row["name"] for row in rows} <= {each.method.name for each in servicer.requests}
    assert all(0 < row["min_response_time"] < 100_000 for row in rows)
    assert "no such thing" in err
