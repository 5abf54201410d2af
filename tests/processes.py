"""`camserve serve` as a process of its own, for tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = """
[[models]]
name = "tiny"
source = "python:tests.nets:tiny_cnn"
input_size = [32, 32]
batch_size = 2
"""


@dataclass
class Served:
    """A server that has said that it is ready, and where."""

    process: subprocess.Popen[str]
    address: str
    health_address: str
    log: Path

    def stderr(self) -> str:
        """What it has logged so far."""
        return self.log.read_text(encoding="utf-8")


@contextmanager
def served(config: Path, **environment: str) -> Iterator[Served]:
    """The process, which is killed at the end if it has not ended by itself."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "camserve_cli", "serve", "--config", str(config)]
    log = config.with_suffix(".log")
    with (
        log.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env) as process,
    ):
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            found = re.fullmatch(r"camserve is ready on ([^,]+)(?:, health on ([^,]+))?, serving .*\n", ready)
            assert found, ready + log.read_text(encoding="utf-8")
            yield Served(process, found[1], found[2] or "", log)
        finally:
            process.kill()
