"""`camserve ray serve` on a cluster of the tests."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camserve.v1 import explain_pb2 as pb
from tests.processes import CAMSERVE, LIMIT_S, environment, started
from tests.ray.cluster import Cluster

# The network that a test can hold, and the image at which it waits: see held_net.py.
HELD = """
[[models]]
name = "held"
source = "python:tests.ray.held_net:held_net"
input_size = [32, 32]
batch_size = 2
"""
WHITE = pb.Image(pixels=pb.Pixels(height=40, width=30, data=b"\xff" * (3 * 40 * 30)))


@dataclass
class Deployment:
    """A `camserve ray serve` process that has reported that it is ready."""

    process: subprocess.Popen[str]
    address: str
    cluster: Cluster

    def log(self) -> list[dict[str, Any]]:
        """Return the complete log lines of all replicas so far."""
        lines = [line for path in self.cluster.logs.glob("worker-*.err") for line in path.read_text().split("\n")[:-1]]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def calls(self, request_id: str) -> list[dict[str, Any]]:
        """Return the log lines of the calls with an identifier."""
        return [line for line in self.log() if line["event"] == "call" and line.get("request_id") == request_id]

    def replicas(self) -> list[int]:
        """Return the processes of all replicas that have been ready, in the order of their file names."""
        logs = [path for path in self.cluster.logs.glob("worker-*.err") if '"event":"ready"' in _compact(path)]
        return [int(path.stem.rpartition("-")[2]) for path in sorted(logs)]

    def stop(self) -> str:
        """Send SIGTERM, require a clean end, and return what the command has written to stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, stderr = self.process.communicate(timeout=LIMIT_S)
        assert self.process.returncode == 0, stderr
        return stderr


def _compact(path: Path) -> str:
    return path.read_text().replace(" ", "")


@contextmanager
def deployed(cluster: Cluster, folder: Path, config: str, *options: str) -> Iterator[Deployment]:
    """Run `camserve ray serve`, and yield it when it is ready. Its process is killed at the end if it still runs.

    Args:
        cluster: The cluster.
        folder: The folder for the configuration file.
        config: The configuration without `listen`.
        options: Options of the command.
    """
    file = folder / "camserve.toml"
    file.write_text(f'listen = "127.0.0.1:{cluster.grpc_port}"\n{config}')
    command = [*CAMSERVE, "ray", "serve", "--config", str(file), "--address", cluster.address, *options]
    with started(command, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = process.stdout.readline()
        found = re.fullmatch(r"camserve is ready on (\S+), serving .*\n", ready)
        assert found, ready + process.stderr.read()
        yield Deployment(process, found[1], cluster)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    pause = threading.Event()
    for _ in range(int(LIMIT_S / 0.1)):
        if condition():
            return
        pause.wait(0.1)
    raise AssertionError("the condition did not become true")
