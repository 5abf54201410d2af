"""Two replicas under a steady load from several client processes.

Meanwhile one replica is killed, one is drained, a third of the requests is cancelled, a tenth is hostile, and the queue
of one replica is filled. If replicas have several front ends, one of them is killed, too. One variant has replicas with
two engines each. The test requires:

- Each request ends with an answer or with a documented error.
- Each answer is bitwise equal to the answer to the same request alone.
- Cancelled requests use no further device time.
- The gauges return to zero.
- Memory does not grow.

The callers send requests until the scenario is over. Each step waits for events, never for a time, so that the test
does not depend on the speed of the machine. The test prints how many requests had which outcome.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import camserve
from tests import nets
from tests.chaos.caller import HOSTILE, IMAGES, TIMEOUT_S, VALID, digest, image, request_name
from tests.processes import CAMSERVE, LIMIT_S, ROOT, children, environment, free_port

CALLERS = 3
CONFIG = """
listen = "127.0.0.1:{port}"
metrics_listen = "127.0.0.1:{metrics}"
frontends = {frontends}
device = "{device}"
threads = 1
grace_s = 120.0
max_rows_owed = 1500
log_level = "warning"

[[models]]
name = "tiny"
source = "python:tests.nets:tiny_cnn"
weights = "tiny.safetensors"
input_size = [32, 32]
batch_size = 4
"""
# Errors that a valid request may get: the server is full, drains, or has stopped, or the deadline has passed.
EXPECTED_ERRORS = {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
# Further errors that a hostile request may get.
REFUSALS = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}


class Replica:
    """A server process that can be killed, drained and started again on its port."""

    def __init__(self, folder: Path, number: int, frontends: int, device: str) -> None:
        self.port, self.metrics_port = free_port(), free_port()
        self._config = folder / f"{number}.toml"
        self._config.write_text(
            CONFIG.format(port=self.port, metrics=self.metrics_port, frontends=frontends, device=device)
        )
        self._log = folder / f"{number}.log"
        self.start()

    def start(self) -> None:
        """Start the process, without waiting until it is ready."""
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [*CAMSERVE, "serve", "--config", str(self._config)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
            )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        assert "ready" in self.process.stdout.readline(), self._log.read_text()

    def end(self, number: signal.Signals) -> int:
        """Send the signal, wait for the end of the process, and return its exit status."""
        self.process.send_signal(number)
        with self.process:  # closes its stdout
            return self.process.wait(LIMIT_S)

    def kill_a_front_end(self) -> None:
        """Kill one of the front ends, and wait until another one has taken its place."""
        before = children(self.process.pid)
        os.kill(min(before), signal.SIGKILL)
        wait_for(lambda: len(children(self.process.pid) - {min(before)}) == len(before), "a front end is missing")

    def client(self) -> camserve.Client:
        return camserve.Client(f"127.0.0.1:{self.port}", timeout=LIMIT_S)

    def metrics(self) -> dict[str, float]:
        """Return all exported values by name, summed over their labels, without the buckets of histograms."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=LIMIT_S) as answer:
            text = answer.read().decode()
        values: Counter[str] = Counter()
        for line in text.splitlines():
            if match := re.fullmatch(r"(\w+)(?:\{.*\})? ([-+.\deE]+|NaN)", line):
                values[match[1]] += float(match[2])  # type: ignore[assignment]
        return dict(values)

    def resident_bytes(self) -> int:
        """Return the memory of the process and of its front ends."""
        kib = 0
        for pid in (self.process.pid, *children(self.process.pid)):
            (resident,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
            kib += int(resident)
        return kib * 1024


class Caller:
    """A client process that sends requests until `stop` is called."""

    def __init__(self, address: str, seed: int, lines: list[dict[str, Any]]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.caller", address, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        self._lines = lines
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(json.loads(line))

    def stop(self) -> int:
        """Let the requests that run end, wait for the end of the process, and return its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        # Each thread finishes at most one request, and each request has a deadline.
        status = self.process.wait(2 * TIMEOUT_S + LIMIT_S)
        self._reader.join()
        return status

    def kill(self) -> None:
        self.process.kill()
        with self.process:  # closes its pipes
            self._reader.join()


@pytest.fixture(params=[(1, "cpu"), (2, "cpu"), (1, "cpu:0,1")], ids=["one process", "two front ends", "two devices"])
def replicas(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Replica]]:
    save_file(nets.tiny_cnn(seed=5).state_dict(), tmp_path / "tiny.safetensors")
    with ExitStack() as ends:
        started = []
        for number in range(2):
            started.append(Replica(tmp_path, number, *request.param))
            ends.callback(started[-1].end, signal.SIGKILL)
        for replica in started:
            replica.wait_until_ready()
        yield started


def answers_alone(replica: Replica) -> dict[str, str]:
    """Return the digests of the answers to all valid requests, sent one after the other."""
    with replica.client() as client:
        return {
            request_name(arguments, number): digest(client.explain(image(number), **arguments))
            for _, arguments in VALID
            for number in range(IMAGES)
        }


def use_all_front_ends(replica: Replica) -> None:
    """Send the valid requests over many connections, which the kernel distributes over the front ends.

    A front end that has just started takes less memory before its first requests.
    """
    for _ in range(16):
        with replica.client() as client:
            for _, arguments in VALID:
                with contextlib.suppress(camserve.ResourceExhausted):  # callers may fill the queue
                    client.explain(image(0), **arguments)


def wait_for(condition: Callable[[], bool], message: str) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until, message
        time.sleep(0.02)


def wait_for_more(lines: list[dict[str, Any]], more: int = 40) -> None:
    """Wait until this number of further requests has ended."""
    wanted = len(lines) + more
    wait_for(lambda: len(lines) >= wanted, "requests no longer end")


def valid_answers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == "valid" and "answer" in line]


def hostile_requests(lines: list[dict[str, Any]]) -> set[str]:
    return {line["request"] for line in lines if line["kind"] == "hostile"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_requests_get_right_answers_while_replicas_fail(
    replicas: list[Replica], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = answers_alone(replicas[0])
    assert answers_alone(replicas[1]) == expected
    address = "ipv4:" + ",".join(f"127.0.0.1:{replica.port}" for replica in replicas)
    lines: list[dict[str, Any]] = []
    with ExitStack() as ends:
        callers = []
        for seed in range(CALLERS):
            callers.append(Caller(address, seed, lines))
            ends.callback(callers[-1].kill)
        killed, drained = replicas
        wait_for_more(lines)
        if children(drained.process.pid):
            drained.kill_a_front_end()
            wait_for_more(lines)
        use_all_front_ends(drained)
        memory = drained.resident_bytes()
        killed.end(signal.SIGKILL)
        wait_for_more(lines)
        killed.start()
        killed.wait_until_ready()
        wait_for_more(lines)
        full = refusals_of_a_full_queue(drained)
        growth = drained.resident_bytes() / memory
        assert drained.end(signal.SIGTERM) == 0, "a drained replica ends with status 0"
        wait_for_more(lines)
        drained.start()
        drained.wait_until_ready()
        wait_for_more(lines)
        wait_for(
            lambda: len(valid_answers(lines)) > 100 and hostile_requests(lines) == {send.__name__ for send in HOSTILE},
            "some kind of request has not been sent, or valid requests are not answered",
        )
        for caller in callers:
            assert caller.stop() == 0, "a request has not ended"

    counts: Counter[str] = Counter()
    for line in lines:
        counts[f"{line['kind']}: {line.get('error', 'answered' if 'answer' in line else 'as expected')}"] += 1
    with capsys.disabled():
        print(f"\n{len(lines)} requests; {full} refused by a full queue; memory × {growth:.2f}")
        for kind, count in sorted(counts.items()):
            print(f"  {kind:36} {count}")

    assert counts["end: as expected"] == CALLERS
    assert all(line["answer"] == expected[line["request"]] for line in valid_answers(lines)), "an answer is wrong"
    errors = {line["error"] for line in lines if line["kind"] in ("valid", "cancelled") and "error" in line}
    assert errors <= EXPECTED_ERRORS, errors
    hostile = [line for line in lines if line["kind"] == "hostile"]
    assert {line.get("error") for line in hostile} <= REFUSALS | EXPECTED_ERRORS, "a hostile request was answered"
    assert full > 0
    assert growth < 1.3
    for replica in replicas:
        assert_idle(replica)


def refusals_of_a_full_queue(replica: Replica) -> int:
    """Send more requests than the queue holds, and return how many were refused with a time for the next attempt."""
    refused = 0
    with replica.client() as client, ExitStack() as streams:
        # Each answer takes many rows. All of them are cancelled at the end.
        for _ in range(20):
            stream = client.explain_stream(image(0), method="rise", parameters={"masks": 1000})
            streams.callback(stream.close)
            try:
                next(stream)
            except camserve.ResourceExhausted as error:
                assert error.retry_after_s is not None
                assert 0 < error.retry_after_s <= 60
                refused += 1
    return refused


def assert_idle(replica: Replica) -> None:
    """Wait until no rows are owed, then require that the replica runs only the rows of new requests."""

    def idle() -> bool:
        values = replica.metrics()
        return not (values["camserve_queue_rows"] or values["camserve_requests_in_flight"])

    wait_for(idle, "rows are owed although all requests have ended")
    with replica.client() as client:
        client.explain(image(0), method="grad-cam")  # a batch that still runs ends before this request's batches
        wait_for(idle, "an answered request is still in flight")
        rows = replica.metrics()["camserve_rows_total"]
        time.sleep(0.5)
        rows += client.explain(image(0), method="grad-cam").cost.rows
    wait_for(idle, "an answered request is still in flight")
    values = replica.metrics()
    assert values["camserve_rows_total"] == rows, "rows of a cancelled request were run"
    assert values["camserve_queue_requests"] == 0
