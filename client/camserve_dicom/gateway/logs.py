"""The log on stderr, in the server's format: text on a terminal, JSON otherwise. It has no value of a header."""

from __future__ import annotations

import logging
import sys
import warnings

import structlog
from structlog.typing import Processor

__all__ = ["log_to_stderr"]


def log_to_stderr(level: str) -> None:
    """Log to stderr, and silence the DICOM libraries, whose messages quote headers and AE titles.

    Args:
        level: Lowest level that is logged: "debug", "info", "warning" or "error".
    """
    renderer: Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso"), renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    for library in ("pynetdicom", "pydicom", "highdicom", "pylibjpeg"):
        logging.getLogger(library).handlers = [logging.NullHandler()]
        logging.getLogger(library).propagate = False
    warnings.simplefilter("ignore")
