"""A Ray cluster with two nodes on this machine, on the loopback address."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import LIMIT_S, children, environment, free_port, started

HOST = "127.0.0.1"
# Without this variable, Ray replaces 127.0.0.1 by an address that other machines can reach. It reads the variable when
# it is imported, also in processes that connect to the cluster.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Identifies the processes of a node, because child processes inherit it.
_MARK = "CAMSERVE_TEST_NODE"
_STORE_BYTES = 100 << 20


@dataclass
class Node:
    """A node of the cluster.

    Attributes:
        name: A custom resource that only this node has, so that a test can place an actor on it.
        mark: Identifies the processes of the node.
    """

    name: str
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def processes(self) -> set[int]:
        """Return the identifiers of the running processes of the node.

        Ray's processes in Python overwrite their environment with a title, so they are found as descendants of others.
        """
        entry, found = f"{_MARK}={self.mark}".encode(), set[int]()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # the process has ended, or belongs to another user
                if entry in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(int(folder.name))
        new = found
        while new:
            new = {child for each in new for child in _children(each)} - found
            found |= new
        return {each for each in found if is_running(each)}

    def kill(self) -> None:
        """End all processes of the node with SIGKILL, as if the machine lost power."""
        running = self.processes()
        _send(running, signal.SIGSTOP)  # or they start further processes now
        running |= self.processes()
        _send(running, signal.SIGKILL)
        end = time.monotonic() + LIMIT_S
        while any(is_running(each) for each in running):
            assert time.monotonic() < end, f"processes of the node {self.name} did not end: {running}"
            time.sleep(0.05)


def _send(processes: set[int], number: signal.Signals) -> None:
    for each in processes:
        with suppress(ProcessLookupError):
            os.kill(each, number)


def _children(process: int) -> set[int]:
    try:
        return children(process)
    except OSError:  # it has ended
        return set()


def is_running(process: int) -> bool:
    """Return False for a process that has ended, also if its parent has not yet noticed."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        address: HOST:PORT for `ray.init` and for options of commands.
        head: The node with the control services of the cluster.
        worker: The other node. A test may kill it.
        grpc_port: A free port for Serve's gRPC proxy on the head.
        logs: The folder with the logs of all processes.
    """

    address: str
    head: Node
    worker: Node
    grpc_port: int
    logs: Path


@contextmanager
def cluster(*, head_cpus: int = 2, worker_cpus: int = 2, **variables: str) -> Iterator[Cluster]:
    """Start a cluster of two nodes, yield it, and kill all processes of both nodes at the end.

    Its processes run this interpreter and can import `tests`. The nodes have the custom resources "head" and "worker".

    Args:
        head_cpus: The CPUs that the head offers, whatever the machine has.
        worker_cpus: The CPUs that the other node offers.
        variables: Environment variables of all processes of the cluster.
    """
    head, worker = Node("head"), Node("worker")
    # Ray creates Unix sockets in this folder, and their paths may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="camserve-ray-", dir="/tmp"))
    # Serve may start a proxy on both nodes, which have the same address.
    grpc_port, worker_grpc_port, *agents = (free_port() for _ in range(4))
    nodes = [
        {
            _MARK: node.mark,
            "node_ip_address": HOST,
            "num_cpus": cpus,
            "resources": {node.name: 1},
            "object_store_memory": _STORE_BYTES,
            "include_dashboard": False,
            "dashboard_agent_listen_port": agents.pop(),
        }
        for node, cpus in ((head, head_cpus), (worker, worker_cpus))
    ]
    command = [sys.executable, "-m", "tests.ray.nodes", json.dumps(nodes), _MARK]
    variables = {
        "RAY_TMPDIR": str(folder),
        "RAY_SERVE_WORKER_PROXY_GRPC_PORT": str(worker_grpc_port),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    log = folder / "nodes.log"
    try:
        with log.open("w") as stderr, started(command, stderr=stderr, env=environment(**variables)) as process:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, log.read_text()
            yield Cluster(address, head, worker, grpc_port, folder / "ray" / "session_latest" / "logs")
    finally:
        worker.kill()
        head.kill()
        shutil.rmtree(folder, ignore_errors=True)
