"""The log of the server. Each line about a request contains its request_id, and its trace_id if it is traced."""

from __future__ import annotations

import logging
import sys
import warnings

import structlog
from structlog.typing import Processor

from camserve_server.config import Config


def log_to_stderr(config: Config) -> None:
    """Set up logging to stderr: coloured lines on a terminal, JSON elsewhere.

    Libraries log in the same format, from the level warning.

    Args:
        config: The configuration, which contains the lowest level.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    for_terminal: list[Processor] = [
        # The traceback omits local variables because they contain images.
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    ]
    as_json: list[Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    render = for_terminal if sys.stderr.isatty() else as_json
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.log_level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    libraries = logging.StreamHandler(sys.stderr)
    libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[libraries], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    # Pillow warns about malformed images with ever different texts, and Python remembers each text for ever.
    warnings.filterwarnings("ignore", module=r"PIL\.")
