"""Structured logs: JSON lines, or a readable console on a terminal.

No event ever holds a token, a lease_id or a body; tracebacks are written without local variables.
"""

import logging
import sys
from functools import cache
from typing import IO, Literal, TextIO, cast

import structlog

from config.log_writer import LogWriter


@cache
def _writer(stream: IO[str]) -> LogWriter:
    """The one writer of a stream: two would mix their lines, after a reload for instance."""
    return LogWriter(stream)


def writer_of_stderr() -> LogWriter:
    """Return what all log lines of this process go through."""
    return _writer(sys.stderr)


def dropped_lines() -> int:
    """Return how many log lines this process could not write."""
    return writer_of_stderr().dropped


def configure_logging(level: str, form: Literal["auto", "json", "console"]) -> None:
    """Send structlog's and the standard library's events to stderr in one form."""
    numeric, writer = logging.getLevelNamesMapping()[level.upper()], writer_of_stderr()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    last: structlog.typing.Processor
    if console:
        last = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    else:
        shared.append(structlog.processors.format_exc_info)
        last = structlog.processors.JSONRenderer(sort_keys=True)
    structlog.configure(
        processors=[*shared, last],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", writer)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processor=last)
    )
    logging.basicConfig(handlers=[handler], level=max(numeric, logging.WARNING), force=True)
