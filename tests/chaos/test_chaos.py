"""Two replicas under a steady load of several client processes, while one is killed, one is drained, a third of the
requests is cancelled, a tenth is hostile, and the queue is full.

What must hold: every request ends, in an answer or in a clear error; every answer is to the bit that of the same
request alone; no row is spent on the dead; gauges come back to zero; memory does not grow. The counts are printed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import camserve
from tests import nets
from tests.chaos.caller import ASKED, PICTURES, WRONG, digest, name, picture

ROOT = Path(__file__).parents[2]
CALLERS = 3
SECONDS = 24.0
CONFIG = """
listen = "127.0.0.1:{port}"
metrics_listen = "127.0.0.1:{metrics}"
device = "cpu"
threads = 1
grace_s = 10.0
max_rows_owed = 1500
log_level = "warning"

[[models]]
name = "tiny"
source = "python:tests.nets:tiny_cnn"
weights = "tiny.safetensors"
input_size = [32, 32]
batch_size = 4
"""
# What a caller may be told of a request that is right: the server is full, is going, has gone, or has no time left.
CLEAR = {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
# And of one that is wrong.
REFUSED = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Replica:
    """A server process that can be killed, drained and started again on its port."""

    def __init__(self, folder: Path, number: int) -> None:
        self.port, self.metrics_port = free_port(), free_port()
        self._config = folder / f"{number}.toml"
        self._config.write_text(CONFIG.format(port=self.port, metrics=self.metrics_port))
        self._log = folder / f"{number}.log"
        self.start()

    def start(self) -> None:
        """Returns when it is ready."""
        command = [sys.executable, "-m", "camserve_cli", "serve", "--config", str(self._config)]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment()
            )
        assert self.process.stdout is not None
        assert "ready" in self.process.stdout.readline(), self._log.read_text()

    def end(self, number: signal.Signals) -> int:
        """Sends the signal; the exit status."""
        self.process.send_signal(number)
        with self.process:  # closes its stdout
            return self.process.wait(30)

    def gauges(self) -> dict[str, float]:
        """All that it exports, without the histograms' buckets; those of several labels summed."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: Counter[str] = Counter()
        for line in text.splitlines():
            if match := re.fullmatch(r"(\w+)(?:\{.*\})? ([-+.\deE]+|NaN)", line):
                found[match[1]] += float(match[2])  # type: ignore[assignment]
        return dict(found)

    def resident_bytes(self) -> int:
        """Of its memory."""
        (line,) = [
            each
            for each in Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            if each.startswith("VmRSS")
        ]
        return int(line.split()[1]) * 1024


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Replica]]:
    save_file(nets.tiny_cnn(seed=5).state_dict(), tmp_path / "tiny.safetensors")
    with ExitStack() as ends:
        made = []
        for number in range(2):
            made.append(Replica(tmp_path, number))
            ends.callback(made[-1].end, signal.SIGKILL)
        yield made


def alone(replica: Replica) -> dict[str, str]:
    """The digest of each answer, asked for one by one."""
    with camserve.Client(f"127.0.0.1:{replica.port}", timeout=60) as client:
        return {
            name(asked, number): digest(client.explain(picture(number), **asked))
            for _, asked in ASKED
            for number in range(PICTURES)
        }


def read(caller: subprocess.Popen[str], lines: list[dict[str, Any]]) -> None:
    assert caller.stdout is not None
    for line in caller.stdout:
        lines.append(json.loads(line))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_chaos(replicas: list[Replica], capsys: pytest.CaptureFixture[str]) -> None:
    expected = alone(replicas[0])
    assert alone(replicas[1]) == expected
    address = "ipv4:" + ",".join(f"127.0.0.1:{replica.port}" for replica in replicas)
    lines: list[dict[str, Any]] = []
    callers, readers = [], []
    with ExitStack() as ends:
        for seed in range(CALLERS):
            command = [sys.executable, "-m", "tests.chaos.caller", address, str(seed), str(SECONDS)]
            caller = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
            callers.append(ends.enter_context(caller))
            ends.callback(caller.kill)
            readers.append(threading.Thread(target=read, args=(caller, lines)))
            readers[-1].start()
        killed, drained = replicas
        wait_for(lines, 60)
        before = drained.resident_bytes()
        killed.end(signal.SIGKILL)
        wait_for(lines, 60)
        killed.start()
        wait_for(lines, 60)
        full = fill(drained)
        grown = drained.resident_bytes() / before
        assert drained.end(signal.SIGTERM) == 0, "it drains"
        wait_for(lines, 60)
        drained.start()
        for caller, reader in zip(callers, readers, strict=True):
            assert caller.wait(120) == 0, "a request has never ended"
            reader.join(30)

    counts: Counter[str] = Counter()
    for line in lines:
        counts[f"{line['kind']}: {line.get('error', 'answered' if 'answer' in line else 'as asked')}"] += 1
    with capsys.disabled():
        print(f"\n{len(lines)} requests; {full} refused by a full queue; memory × {grown:.2f}")
        for what, count in sorted(counts.items()):
            print(f"  {what:36} {count}")

    assert counts["end: as asked"] == CALLERS
    asked = [line for line in lines if line["kind"] == "asked"]
    assert sum("answer" in line for line in asked) > 100, "there was a load"
    assert all(line["answer"] == expected[line["asked"]] for line in asked if "answer" in line), "an answer is wrong"
    errors = {line["error"] for line in lines if line["kind"] in ("asked", "cancelled") and "error" in line}
    assert errors <= CLEAR, errors
    hostile = [line for line in lines if line["kind"] == "hostile"]
    assert {line["asked"] for line in hostile} == {wrong.__name__ for wrong in WRONG}
    assert {line.get("error") for line in hostile} <= REFUSED | CLEAR, "each is refused, none is answered"
    assert full > 0
    assert grown < 1.3
    for replica in replicas:
        quiet(replica)


def wait_for(lines: list[dict[str, Any]], more: int) -> None:
    """Until so many more requests have ended."""
    wanted, until = len(lines) + more, time.monotonic() + 30
    while len(lines) < wanted:
        assert time.monotonic() < until, "nothing is answered any more"
        time.sleep(0.02)


def fill(replica: Replica) -> int:
    """Asks for far more than the queue holds; how often that was refused, each time with a time to try again."""
    refused = 0
    with camserve.Client(f"127.0.0.1:{replica.port}", timeout=60) as client, ExitStack() as streams:
        # Each is an answer of many rows, which is given up at the end.
        for _ in range(20):
            stream = client.explain_stream(picture(0), method="rise", parameters={"masks": 1000})
            streams.callback(stream.close)
            try:
                next(stream)
            except camserve.ResourceExhausted as error:
                assert error.retry_after_s is not None
                assert 0 < error.retry_after_s <= 60
                refused += 1
    return refused


def quiet(replica: Replica) -> None:
    """Nothing is owed any more, and no row is run for anybody."""
    until = time.monotonic() + 10
    while (gauges := replica.gauges())["camserve_queue_rows"] or gauges["camserve_requests_in_flight"]:
        assert time.monotonic() < until, gauges
        time.sleep(0.05)
    rows = gauges.get("camserve_rows_total", 0)
    time.sleep(0.5)
    gauges = replica.gauges()
    assert gauges.get("camserve_rows_total", 0) == rows, "a row was spent on the dead"
    assert gauges["camserve_queue_requests"] == 0
