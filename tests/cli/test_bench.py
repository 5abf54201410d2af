"""`camserve bench` and the locustfile, from end to end."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

import camserve
from camserve_cli.app import app
from camserve_cli.load import batch_fill, stats
from camserve_server.config import Config, ModelConfig
from tests.cli.test_report import Outline
from tests.conftest import serving

ROOT = Path(__file__).parents[2]


def bench(*arguments: object) -> Result:
    line = ["bench", *map(str, arguments)]
    if "--duration" not in line:
        line += ["--duration", "0.5", "--warmup", "0.1"]
    return CliRunner().invoke(app, line, env={"COLUMNS": "200"})


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_a_mix_becomes_tables_a_csv_and_a_page(address, servicer, photo, tmp_path):
    path, page = tmp_path / "out.csv", tmp_path / "out.html"
    ran = bench(
        *("--address", address, "--method", "fake-cam=3", "--method", "opti-cam=1:steps=2", "--image", photo),
        *("--rate", 60, "--csv", path, "--report", page, "--metric", "insertion", "--budget", 7, "--seed", 1),
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    asked = [each for each in servicer.requests if hasattr(each, "image")]
    assert {each.method.name for each in asked} == {"fake-cam", "opti-cam"}
    assert {(each.image.encoded, each.budget, each.top_k) for each in asked} == {(photo.read_bytes(), 7, 1)}
    assert {dict(each.method.parameters).get("steps") for each in asked} == {None, 2}
    rows = rows_of(path)
    assert 0 < len(rows) < len(asked), "the warm-up is left out"
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


def test_json_says_all(address):
    ran = bench("--address", address, "--method", "fake-cam", "--in-flight", 2, "--json")
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    [every] = said["summaries"]
    assert every["answered"] == every["requests"] > 0
    assert every["rows_per_s"] == pytest.approx(12 * every["requests_per_s"])
    assert set(every["latency_ms"]) == {"p50", "p90", "p99", "p99.9", "max"}
    assert (said["load"]["load"], said["load"]["weights"]) == ("closed loop, 2 in flight", "sha256:0")
    assert (said["knee"], said["steps"], said["fill"]) == (None, [], None)


def test_the_knee_of_a_server_that_does_one_at_a_time(address, servicer, tmp_path):
    one = threading.Lock()

    def before(_: object) -> None:
        with one:
            time.sleep(0.04)

    page, path = tmp_path / "k.html", tmp_path / "k.csv"
    line = ("--method", "fake-cam", "--knee", "--p99", 0.25, "--rate", 80, "--arrivals", "constant", "--seed", 3)
    servicer.before = lambda context: before(context) if hasattr(servicer.requests[-1], "image") else None
    ran = bench(
        "--address", address, *line, "--duration", 0.6, "--warmup", 0, "--json", "--report", page, "--csv", path
    )
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    met = {step["rate"]: step["met"] for step in said["steps"]}
    # 80 a second are 1.3 s of work more than there is time for.
    assert met[80] is False
    assert said["steps"][0]["dropped"]
    assert said["steps"][0]["summary"]["errors"][stats.UNFINISHED] > 0
    assert said["knee"] == max((rate for rate in met if met[rate]), default=None)
    for step in said["steps"]:
        of = step["summary"]
        answered = of["answered"] == of["requests"] and of["latency_ms"]["p99"] <= 250
        assert step["met"] == answered, "of less than a hundred requests, all must be in time"
    assert said["knee"] is None or said["knee"] < 40
    assert {float(row["rate"]) for row in rows_of(path)} == {float(f"{r:.6g}") for r in met}
    assert "Measured rates" in page.read_text(encoding="utf-8")
    assert ran.stderr.count("/s: p99 ") == len(met)


def test_ctrl_c_ends_it_with_what_was_measured(address, servicer, tmp_path):
    path = tmp_path / "out.csv"
    line = [sys.executable, "-m", "camserve_cli", "bench", "--address", address, "--method", "fake-cam"]
    line += ["--duration", "500", "--warmup", "0", "--csv", str(path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(servicer.requests) < 50 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "note: interrupted before the end" in err
    assert re.search(r"^all +\d+ ", out, re.MULTILINE)
    assert len(rows_of(path)) >= 30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--knee",), "--knee and --p99 must be given together"),
        (("--p99", 1), "--knee and --p99 must be given together"),
        (("--in-flight", 2, "--rate", 1), "a closed loop cannot be combined"),
        (("--method", "fake-cam=0"), "expected a number above 0"),
        (("--method", "fake-cam=x:a=1"), "expected a number above 0"),
        (("--method", "fake-cam=1", "--method", "fake-cam=2"), "two of the methods are the same"),
    ],
)
def test_options_that_make_no_sense(options, said):
    ran = bench("--address", "127.0.0.1:1", *options)
    assert (ran.exit_code, said in ran.stderr) == (2, True), ran.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "none"), "error: there is no method 'none'; there are: opti-cam, poly-cam, fake-cam"),
        (("--method", "poly-cam"), "error: the model first cannot serve the method poly-cam: no such layers"),
        (("--method", "fake-cam", "--metric", "none"), "error: there is no metric 'none'"),
        (("--method", "fake-cam", "--model", "none"), "error: there is no model 'none'"),
        (("--method", "fake-cam", "--metrics-url", "http://127.0.0.1:1/metrics"), "Connection refused"),
    ],
)
def test_what_cannot_be_asked_is_said_at_once(address, servicer, options, said):
    ran = bench("--address", address, *options, "--duration", 600)
    assert (ran.exit_code, said in ran.stderr) == (1, True), ran.stderr
    assert not [each for each in servicer.requests if hasattr(each, "image")]


def test_how_full_batches_were_is_read_from_the_server():
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    config = Config(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", models=[tiny])
    with serving(config) as server:
        url = f"http://{server.metrics_address}/metrics"
        assert batch_fill.read_counters(url) == (0, 0)
        line = [sys.executable, "-m", "camserve_cli", "bench", "--address", server.address, "--method", "grad-cam"]
        line += ["--in-flight", "2", "--duration", "0.5", "--warmup", "0", "--metrics-url", url, "--json"]
        # Another process than the server's: two event loops of gRPC in one get in each other's way.
        ran = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        rows, padding = batch_fill.read_counters(url)
        with pytest.raises(camserve.InvalidArgument, match="has no metrics of a camserve server"):
            batch_fill.read_counters(f"http://{server.metrics_address}/metrics?name[]=camserve_ready")
    assert ran.returncode == 0, ran.stderr
    full = json.loads(ran.stdout)["fill"]
    assert rows / (rows + padding) == pytest.approx(full)
    # At most two requests of a row each share batches of four.
    assert 0.25 <= full <= 0.5


def test_a_page_without_the_counters_is_said():
    with pytest.raises(ValueError, match="camserve_rows_total"):
        batch_fill.parse_counters("# TYPE python_info gauge\npython_info 1.0\n")
    text = '# TYPE camserve_rows_total counter\ncamserve_rows_total{model="a b",lane="forward"} 6.0\n'
    text += 'camserve_rows_total{model="b",lane="forward"} 1e1\n# TYPE camserve_padding_rows_total counter\n'
    assert batch_fill.parse_counters(text) == (16, 0)
    assert batch_fill.fill_share((10, 0), (16, 2)) == 0.75
    assert batch_fill.fill_share((10, 1), (10, 1)) is None


# ---- locust ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed")
def test_locust_reports_calls_and_what_goes_wrong(address, servicer):
    def before(context: grpc.ServicerContext) -> None:
        if len(servicer.requests) % 2:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such thing")

    servicer.before = before
    # In a process of its own: it patches the whole of it.
    line = [shutil.which("locust", path=str(Path(sys.executable).parent)) or "locust", "--headless", "--host", address]
    line += ["-f", str(ROOT / "examples" / "locustfile.py"), "-u", "2", "-r", "2", "-t", "100s", "--json"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 100
        while len(servicer.requests) < 6 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    rows = json.loads(out)
    count, failed = (sum(row[name] for row in rows) for name in ("num_requests", "num_failures"))
    assert 3 <= count <= len(servicer.requests)
    assert 1 <= failed < count
    assert {row["method"] for row in rows} == {"Explain"}
    assert {row["name"] for row in rows} <= {each.method.name for each in servicer.requests}
    assert all(0 < row["min_response_time"] < 100_000 for row in rows)
    assert "no such thing" in err
