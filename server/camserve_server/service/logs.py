"""The log: every line of a request has its id, and its trace's where there is one."""

from __future__ import annotations

import logging
import sys
import warnings

import structlog
from structlog.typing import Processor

from camserve_server.config import Config


def log_to_stderr(config: Config) -> None:
    """Logs as lines for people on a terminal, as JSON elsewhere; so do the libraries, from their warnings up."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    for_people: list[Processor] = [
        # Without local variables: they hold images.
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    ]
    for_programs: list[Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    render = for_people if sys.stderr.isatty() else for_programs
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
    # What Pillow says of hostile pictures is in ever new words, and Python keeps all that it has warned of.
    warnings.filterwarnings("ignore", module=r"PIL\.")
