"""Gateways for tests: in this process, or as a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from camserve_dicom.gateway.config import Config
from camserve_dicom.gateway.process import Gateway
from camserve_server.service.server import Server
from tests.dicom.pacs import Pacs, free_port

ROOT = Path(__file__).parents[2]
RULE = {"model": "tiny", "method": "grad-cam", "outputs": ["sc"], "check": "insertion>=0"}


class Spooled:
    """The spool of a gateway, as somebody sees it who looks into it."""

    def __init__(self, spool: Path, said: str) -> None:
        self.spool = spool
        self.address = said.partition(" ")[0]
        self.monitor = said.rpartition(" ")[2]

    def audit(self) -> list[dict[str, Any]]:
        path = self.spool / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self) -> list[str]:
        return [line["event"] for line in self.audit()]

    def entries(self, stage: str) -> list[Path]:
        return sorted((self.spool / stage).iterdir())

    def idle(self) -> bool:
        return not any(self.entries(stage) for stage in ("inbox", "outbox", "stored"))

    def dead(self) -> list[dict[str, Any]]:
        """Why entries were given up."""
        return [json.loads((entry / "reason.json").read_text()) for entry in self.entries("dead")]


class Opened(Protocol):
    """Opens a gateway with those keys."""

    def __call__(self, **given: Any) -> AbstractContextManager[Spooled]: ...


def config(tmp_path: Path, tiny: Server, there: Pacs, **given: Any) -> Config:
    """Of a gateway between the two, which the PACS is told of."""
    there.gateway = f"127.0.0.1:{free_port()}"
    defaults = {
        "spool": tmp_path / "spool",
        "listen": there.gateway,
        "monitor_listen": "127.0.0.1:0",
        "callers": ["MODALITY"],
        "min_free_bytes": 0,
        "grace_s": 5,
        "server": {"address": tiny.address},
        "rules": [RULE],
    }
    pacs = {"ae_title": "PACS", "address": there.address} | given.pop("pacs", {})
    return Config(**defaults | {"pacs": pacs} | given)


def nobody() -> dict[str, Any]:
    """`[server]` of one that is away."""
    return {"address": f"127.0.0.1:{free_port()}", "timeout_s": 0.3}


def asked(running: Spooled, path: str) -> tuple[int, str]:
    """What the monitor answers."""
    try:
        with urllib.request.urlopen(f"http://{running.monitor}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@contextmanager
def opened(config: Config) -> Iterator[Spooled]:
    """A gateway on threads of this process."""
    gateway = Gateway(config)
    try:
        yield Spooled(config.spool, gateway.open())
    finally:
        gateway.close()


@contextmanager
def process(config: Path, spool: Path) -> Iterator[tuple[subprocess.Popen[str], Spooled]]:
    """`camserve dicom gateway`, killed at the end if it has not ended by itself."""
    command = [sys.executable, "-m", "camserve_cli", "dicom", "gateway", "--config", str(config)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        config.with_suffix(".log").open("a") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env) as running,
    ):
        try:
            assert running.stdout is not None
            ready = re.fullmatch(r"camserve gateway is ready on (.*)\n", running.stdout.readline())
            assert ready, config.with_suffix(".log").read_text()
            yield running, Spooled(spool, ready[1])
        finally:
            running.kill()
