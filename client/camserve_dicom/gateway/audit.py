"""The audit trail: what happened to which object, as lines of JSON that are only ever added to, and counted."""

from __future__ import annotations

import json
import logging
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter

__all__ = ["Audit"]

log = logging.getLogger(__name__)


# What may be cut short is said again at once or by the next start: a few lines from the end.
END_BYTES = 1 << 16


class Audit:
    """Writes to `path`; each line is on the disk before what it is about is answered.

    No line has a name, date, path or UID of the image: `object` and `results` are keyed hashes.
    """

    def __init__(self, path: Path, registry: CollectorRegistry) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._events = Counter("camserve_gateway_events", "What the audit trail says.", ["event"], registry=registry)

    def write(self, event: str, **said: Any) -> None:
        """Adds a line. Raises OSError where it cannot."""
        with self._lock:
            self._write(event, said)

    def write_once(self, event: str, **said: Any) -> None:
        """As `write`, unless it was the last that was said of the object: a step that was cut short is done again."""
        with self._lock:
            if self._last(said["object"]) != {"event": event, **said}:
                self._write(event, said)

    def _write(self, event: str, said: dict[str, Any]) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **said}
        # Opened for each line, so that the file may be moved away and begun anew.
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            before = os.fstat(file).st_size
            try:
                _write_whole(file, json.dumps(line).encode() + b"\n")
            except OSError:
                os.ftruncate(file, before)  # half a line would spoil the next one, too
                raise
        finally:
            os.close(file)
        self._events.labels(event).inc()
        log.info(event, extra={"said": said})

    def _last(self, name: str) -> dict[str, Any]:
        """What was last said of the object, without the time; nothing where that is long ago."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - END_BYTES))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return {}
        found = next((line for line in reversed(lines) if f'"object": "{name}"'.encode() in line), b"{}")
        try:
            return {key: value for key, value in json.loads(found).items() if key != "time"}
        except ValueError:  # only its end is among those that were read
            return {}


def _write_whole(file: int, data: bytes) -> None:
    while data:  # a disk that is nearly full takes a part
        data = data[os.write(file, data) :]
    os.fsync(file)
