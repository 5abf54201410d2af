"""The log on stderr, in the server's format: text on a terminal, JSON otherwise. It has no value of a header."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings

import structlog
from structlog.typing import Processor

__all__ = ["log_to_stderr"]


def log_to_stderr(level: str) -> None:
    """Log to stderr, and silence the DICOM libraries, whose messages quote headers and AE titles.

    Args:
        level: Lowest level that is logged: "debug", "info", "warning" or "error".
    """
    on_terminal = sys.stderr.isatty()
    if not on_terminal and level != "debug":
        _discard_native_output()
    renderer: Processor = structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso"), renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    for library in ("pynetdicom", "pydicom", "highdicom", "pylibjpeg"):
        logging.getLogger(library).handlers = [logging.NullHandler()]
        logging.getLogger(library).propagate = False
    warnings.simplefilter("ignore")
    threading.excepthook = _log_exception


def _discard_native_output() -> None:
    """Let only Python write to stderr. gRPC and image decoders write text to file descriptor 2, also without an error.

    Log level "debug" keeps this text.
    """
    log = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    discarded = os.open(os.devnull, os.O_WRONLY)
    os.dup2(discarded, 2)
    os.close(discarded)
    sys.stderr = log


def _log_exception(failure: threading.ExceptHookArgs) -> None:
    """Log the type of an exception that ended a thread; its message may quote a header."""
    structlog.get_logger().error("thread ended", error=failure.exc_type.__name__)
