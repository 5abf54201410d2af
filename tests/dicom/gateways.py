"""Gateways for tests: in this process, in a forked process, or as the command of the command line."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from camserve_dicom.gateway import steps
from camserve_dicom.gateway.config import Config, read
from camserve_dicom.gateway.process import Gateway, run
from tests.dicom.pacs import Pacs
from tests.processes import CAMSERVE, LIMIT_S, ROOT, free_port, started

if TYPE_CHECKING:  # the forked gateways do not need torch, which takes seconds to import
    from camserve_server.service.server import Server

__all__ = [
    "ROOT",
    "RULE",
    "UNREACHABLE_SERVER",
    "OpenGateway",
    "RunningGateway",
    "Spooled",
    "command",
    "config",
    "forked",
    "opened",
    "request",
    "write_config",
]

# One metric is enough for the check, and saves time.
RULE: dict[str, Any] = {
    "model": "tiny",
    "method": "grad-cam",
    "outputs": ["sc"],
    "metrics": ["average-gain"],
    "check": "average-gain>=0",
}
# The configuration of a gateway in a process of its own. The texts of tests follow, beginning with keys of [pacs].
_CONFIG = """
spool = "spool"
listen = "{listen}"
callers = ["MODALITY"]
min_free_bytes = 0

[server]
address = "{server}"

[pacs]
ae_title = "PACS"
address = "{pacs}"
"""
# Nothing listens on port 1 of the loopback address.
UNREACHABLE_SERVER: dict[str, Any] = {"address": "127.0.0.1:1", "timeout_s": 0.3}


class Spooled:
    """A gateway, observed through its spool.

    Args:
        spool: The folder of the spool.
        ready: The text that the gateway passes to `ready`: its addresses.
    """

    def __init__(self, spool: Path, ready: str) -> None:
        self.spool = spool
        self.address = ready.partition(" ")[0]
        self.monitor = ready.rpartition(" ")[2]

    def audit(self) -> list[dict[str, Any]]:
        """Return the complete lines of the audit trail."""
        path = self.spool / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def events(self) -> list[str]:
        """Return the events of the audit trail."""
        return [line["event"] for line in self.audit()]

    def entries(self, stage: str) -> list[Path]:
        """Return the entries of a stage, sorted by name."""
        return sorted((self.spool / stage).iterdir())

    def idle(self) -> bool:
        """Return True if there is nothing to do."""
        return not any(self.entries(stage) for stage in ("inbox", "outbox", "stored", "notify"))

    def dead(self) -> list[dict[str, Any]]:
        """Return the content of reason.json of each entry that failed permanently."""
        return [json.loads((entry / "reason.json").read_text()) for entry in self.entries("dead")]


class OpenGateway(Protocol):
    """A function that opens a gateway with these keys of the configuration."""

    def __call__(self, **keys: Any) -> AbstractContextManager[Spooled]:
        """Return a context in which the gateway runs."""


def config(tmp_path: Path, tiny: Server, pacs: Pacs, /, **keys: Any) -> Config:
    """Return the configuration of a gateway between a server and a PACS."""
    defaults: dict[str, Any] = {
        "spool": tmp_path / "spool",
        "listen": "127.0.0.1:0",
        "monitor_listen": "127.0.0.1:0",
        "callers": ["MODALITY"],
        "min_free_bytes": 0,
        "grace_s": 5,
        "server": {"address": tiny.address},
        "rules": [RULE],
    }
    destination = {"ae_title": "PACS", "address": pacs.address} | keys.pop("pacs", {})
    return Config.model_validate(defaults | {"pacs": destination} | keys)


def write_config(folder: Path, server: str, pacs: Pacs, text: str) -> Path:
    """Write the configuration of a gateway with a fixed port, which the PACS reports to.

    Args:
        folder: The folder of the file.
        server: Address of the server.
        pacs: The PACS.
        text: The end of the file: further keys of [pacs], and further tables.
    """
    pacs.gateway = f"127.0.0.1:{free_port()}"
    path = folder / "gateway.toml"
    path.write_text(_CONFIG.format(listen=pacs.gateway, server=server, pacs=pacs.address) + text)
    return path


def request(running: Spooled, path: str) -> tuple[int, str]:
    """Return the HTTP status and the body of a response of the monitor."""
    try:
        with urllib.request.urlopen(f"http://{running.monitor}{path}", timeout=LIMIT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@contextmanager
def opened(config: Config, pacs: Pacs | None = None) -> Iterator[Spooled]:
    """Run a gateway in threads of this process; the PACS reports commitments to it."""
    if pacs is not None:
        pacs.gateway = ""
    gateway = Gateway(config)
    try:
        running = Spooled(config.spool, gateway.open())
        if pacs is not None:
            pacs.gateway = running.address
        yield running
    finally:
        gateway.close()


class RunningGateway(Spooled):
    """A gateway in a process of its own.

    Args:
        spool: The folder of the spool.
        ready: The text that the gateway passes to `ready`.
        pid: The id of the process.
        wait: Waits for the process and returns its exit status.
    """

    def __init__(self, spool: Path, ready: str, pid: int, wait: Callable[[], int | None]) -> None:
        super().__init__(spool, ready)
        self._pid, self.wait = pid, wait

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self._pid, signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        os.kill(self._pid, signal.SIGTERM)


def _run_gateway(path: Path, log: Path, ready: Connection) -> None:
    """Run `camserve_dicom.gateway.run` in this process, with stderr appended to a file."""
    with log.open("ab") as stderr:
        os.dup2(stderr.fileno(), 2)
    steps.REPORT_WAIT_S = LIMIT_S  # the wait ends with the report, however slow the machine is
    run(read(path), ready.send)


@contextmanager
def forked(path: Path, spool: Path) -> Iterator[RunningGateway]:
    """Run a gateway in a forked process, and kill it at the end if it still runs.

    The process is forked from a server process that has the modules loaded, so it starts in a fraction of the time of
    the command. It runs the same function.

    Args:
        path: The configuration file. The log is written beside it.
        spool: The folder of the spool.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["camserve_dicom.gateway", "tests.dicom.gateways"])
    receiver, sender = context.Pipe(duplex=False)
    log = path.with_suffix(".log")
    process = context.Process(target=_run_gateway, args=(path, log, sender), daemon=True)
    process.start()
    sender.close()

    def wait() -> int | None:
        process.join(LIMIT_S)
        return process.exitcode

    try:
        assert receiver.poll(LIMIT_S), log.read_text()
        try:
            ready = receiver.recv()
        except EOFError:
            raise AssertionError(log.read_text()) from None
        assert process.pid is not None
        yield RunningGateway(spool, ready, process.pid, wait)
    finally:
        process.kill()
        process.join()
        process.close()
        receiver.close()


@contextmanager
def command(path: Path, spool: Path) -> Iterator[RunningGateway]:
    """Run `camserve dicom gateway`, and kill it at the end if it still runs. The log is written beside `path`."""
    log = path.with_suffix(".log")
    with (
        log.open("a") as stderr,
        started([*CAMSERVE, "dicom", "gateway", "--config", str(path)], stderr=stderr) as process,
    ):
        assert process.stdout is not None
        ready = re.fullmatch(r"camserve gateway is ready on (.*)\n", process.stdout.readline())
        assert ready, log.read_text()
        yield RunningGateway(spool, ready[1], process.pid, lambda: process.wait(LIMIT_S))
