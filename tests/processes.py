"""Child processes for tests, among them `camserve serve`."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import camserve

ROOT = Path(__file__).parent.parent
CAMSERVE = [sys.executable, "-m", "camserve_cli"]
# A safety net for a process that hangs. No test should come near it, even on a slow machine with other work.
LIMIT_S = 240
TINY = """
[[models]]
name = "tiny"
source = "python:tests.nets:tiny_cnn"
input_size = [32, 32]
batch_size = 2
"""


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a child process that can import `tests`, with these variables set."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


@contextmanager
def started(
    command: Sequence[str | Path],
    *,
    stdout: int | IO[str] | None = subprocess.PIPE,
    stderr: int | IO[str] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Start a process in text mode, yield it, and kill it at the end if it still runs.

    Args:
        command: The program and its arguments.
        stdout: As in `subprocess.Popen`; a pipe by default.
        stderr: As in `subprocess.Popen`; that of pytest by default.
        cwd: The working directory.
        env: All environment variables; those of `environment()` by default.
    """
    variables = environment() if env is None else env
    with subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=cwd, text=True, env=variables) as process:
        try:
            yield process
        finally:
            process.kill()


def program(name: str) -> str | None:
    """Return the path of a program of this Python environment, or else of PATH; None if there is none."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def completed(
    command: Sequence[str | Path],
    *,
    stdin: str = "",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a process until it ends, and return its exit status and its output.

    Args:
        command: The program and its arguments.
        stdin: The text on standard input; nothing by default.
        cwd: The working directory.
        env: All environment variables; those of `environment()` by default.
    """
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        cwd=cwd,
        text=True,
        env=environment() if env is None else env,
        timeout=LIMIT_S,
        check=False,
    )


def children(pid: int) -> set[int]:
    """Return the identifiers of the child processes of a process."""
    found: set[int] = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            found.update(map(int, (thread / "children").read_text().split()))
    return found


def free_port() -> int:
    """Return a port of the loopback address that is free now and stays free while nothing listens.

    It is below the range from which the kernel takes ports of outgoing connections and of listeners on port 0.
    Otherwise one of them, even a connection to this port itself, might occupy it until a server listens there.
    """
    for port in random.SystemRandom().sample(range(12_000, 32_000), 1000):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


@dataclass
class Served:
    """A `camserve serve` process that has reported that it is ready."""

    process: subprocess.Popen[str]
    address: str
    health_address: str
    log: Path

    def stderr(self) -> str:
        """Return the log so far."""
        return self.log.read_text(encoding="utf-8")


@contextmanager
def served(config: Path, *options: str, **variables: str) -> Iterator[Served]:
    """Start `camserve serve`, yield it when it is ready, and kill it at the end if it still runs.

    Args:
        config: The configuration file. The log is written beside it.
        options: Options of the command line.
        variables: Environment variables that are set in addition to those of pytest.
    """
    log = config.with_suffix(".log")
    command = [*CAMSERVE, "serve", "--config", str(config), *options]
    with (
        log.open("w", encoding="utf-8") as stderr,
        started(command, stderr=stderr, env=environment(**variables)) as process,
    ):
        assert process.stdout is not None
        ready = process.stdout.readline()
        addresses = re.fullmatch(r"camserve is ready on ([^,]+)(?:, health on ([^,]+))?, serving .*\n", ready)
        assert addresses, ready + log.read_text(encoding="utf-8")
        yield Served(process, addresses[1], addresses[2] or "", log)


def patient_client(address: str, **options: Any) -> camserve.Client:
    """Return a client whose calls time out only if the server hangs.

    The default of 30 s for a call can be too short on a slow machine. Tests of timeouts give their own.
    """
    return camserve.Client(address, **{"timeout": LIMIT_S, **options})


@contextmanager
def listening(server: socketserver.TCPServer) -> Iterator[str]:
    """Run a server of the loopback address in a thread, and close it at the end. The value is its HOST:PORT."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def overloaded_server() -> Iterator[str]:
    """Run a server that ends each HTTP/2 connection with GOAWAY; yield its address.

    gRPC itself writes this reason to the standard error stream.
    """
    text = (0).to_bytes(4) + (11).to_bytes(4) + b"too_many_pings"

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            self.request.sendall(b"\0\0\0\4\0\0\0\0\0" + len(text).to_bytes(3) + b"\7\0\0\0\0\0" + text)

    with listening(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as address:
        yield address
