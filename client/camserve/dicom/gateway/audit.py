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
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **said}
        with self._lock:
            # Opened for each line, so that the file may be moved away and begun anew.
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(file, json.dumps(line).encode() + b"\n")
                os.fsync(file)
            finally:
                os.close(file)
        self._events.labels(event).inc()
        log.info(event, extra={"said": said})
