"""The audit trail: a file of JSON lines that records what happened to each object."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter

__all__ = ["Audit"]

log = structlog.get_logger()

# `write_once` searches this part of the file for an earlier line. An interrupted step is repeated immediately or at the
# next start, so its line is near the end.
TAIL_BYTES = 1 << 16


class Audit:
    """Writer of the audit trail. The file is only appended to.

    Lines contain no name, date, path or UID of an image: `object` and `result` are keyed hashes.

    Args:
        path: The file. It may be moved away at any time; the next line creates it again.
        registry: Registry of the counter `camserve_gateway_events_total`.
    """

    def __init__(self, path: Path, registry: CollectorRegistry) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._events = Counter("camserve_gateway_events", "Events of the audit trail.", ["event"], registry=registry)

    def write(self, event: str, **fields: Any) -> None:
        """Append a line and wait until it is on the disk. It is also logged.

        Args:
            event: Name of the event.
            **fields: Further keys of the line.

        Raises:
            OSError: If the line cannot be written. The file has no part of it then.
        """
        with self._lock:
            self._write(event, fields)

    def write_once(self, event: str, **fields: Any) -> None:
        """Append a line unless it equals the last line of the same object, because an interrupted step is repeated.

        Args:
            event: Name of the event.
            **fields: Further keys of the line, among them `object`.

        Raises:
            OSError: As for `write`.
        """
        with self._lock:
            if self._last_line(fields["object"]) != {"event": event, **fields}:
                self._write(event, fields)

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        # The file is opened for each line, so that it may be moved away for rotation.
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size_before = os.fstat(file).st_size
            try:
                _write_all(file, json.dumps(line).encode() + b"\n")
            except OSError:
                os.ftruncate(file, size_before)  # an incomplete line would corrupt the next one
                raise
        finally:
            os.close(file)
        self._events.labels(event).inc()
        log.info(event, **fields)

    def _last_line(self, name: str) -> dict[str, Any]:
        """Return the last line of an object without its time; empty if it is not in the tail of the file."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return {}
        last = next((line for line in reversed(lines) if f'"object": "{name}"'.encode() in line), b"{}")
        try:
            return {key: value for key, value in json.loads(last).items() if key != "time"}
        except ValueError:  # the tail begins in the middle of this line
            return {}


def _write_all(file: int, data: bytes) -> None:
    """Write all bytes, because a single write may be partial on an almost full disk, and synchronise the file."""
    while data:
        data = data[os.write(file, data) :]
    os.fsync(file)
