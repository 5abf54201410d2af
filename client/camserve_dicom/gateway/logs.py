"""The log, on stderr: lines for people on a terminal, JSON elsewhere. Nothing of a header stands in it."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from datetime import UTC, datetime

__all__ = ["log_to_stderr"]

_OURS = "camserve_dicom.gateway"


class _Line(logging.Formatter):
    def __init__(self, people: bool) -> None:
        super().__init__()
        self._people = people

    def format(self, record: logging.LogRecord) -> str:
        said = dict(getattr(record, "said", {}))
        if record.exc_info and record.exc_info[0]:
            # What an exception says may be out of the header.
            said["error"] = record.exc_info[0].__name__
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        level = record.levelname.lower()
        if self._people:
            return " ".join([time, f"{level:7}", record.msg, *(f"{key}={value}" for key, value in said.items())])
        return json.dumps({"event": record.msg, **said, "level": level, "timestamp": time})


def log_to_stderr(level: str) -> None:
    """Logs this package from the level up, and nothing of the libraries: what they say quotes headers and titles."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(sys.stderr.isatty()))
    ours = logging.getLogger(_OURS)
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(level.upper())
    for library in ("pynetdicom", "pydicom", "highdicom", "pylibjpeg"):
        logging.getLogger(library).handlers = [logging.NullHandler()]
        logging.getLogger(library).propagate = False
    warnings.simplefilter("ignore")
