"""Logs on standard error: one JSON object a line, or a console form for eyes; structlog and the standard library alike.

No secrets and no queries: whatever looks like a URL loses its user, password, query and fragment on the way out.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

from worker.clock import Clock, SystemClock
from worker.settings import LogSettings

FOREIGN_INTERVAL_S = 10.0
"""A warning of another library is written once in this time and place; the next line says how many were left out."""

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<authority>[^\s\"'<>/?#\\]*)(?P<path>[^\s\"'<>?#\\]*)(?P<rest>[?#][^\s\"'<>\\]*)?"
)


def configure(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's root logger; safe to call again.

    Args:
        settings: level and format.
        stream: standard error by default.
    """
    level = logging.getLevelNamesMapping()[settings.level]
    lines = _Lines(stream or sys.stderr)
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _mask_urls,
    ]
    renderer = _renderer(settings.format, colors=lines.isatty())
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: lines,
        # Not cached: a later configure() must reach the loggers that modules made when they were imported. Nothing is logged
        # for an event that goes well, so the microseconds do not matter.
        cache_logger_on_first_use=False,
    )
    _route_standard_library(max(level, logging.WARNING), shared, renderer, lines)


def silence() -> None:
    """For commands whose output is a report: what libraries and our own stages log is not shown."""
    root = logging.getLogger()
    root.addHandler(logging.NullHandler())  # without any handler the standard library writes warnings to standard error
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def mask_urls(text: str) -> str:
    """Every URL in `text` without user, password, query and fragment."""
    if "://" not in text:
        return text
    return _URL.sub(_masked, text)


def mask_credentials(url: str) -> str:
    """One URL that may hold a password, without it, even where the password's own `/`, `?` or `#` are not escaped."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return "********"
    return mask_urls(f"{scheme}://{rest.rpartition('@')[2]}")


def _masked(match: re.Match[str]) -> str:
    host = match["authority"].rpartition("@")[2]
    port = "" if host.startswith("[") else host.partition(":")[2]
    if port and not port.isdigit():
        return f"{match['scheme']}***"  # no port, so likely a password cut short by a character that should be escaped
    return f"{match['scheme']}{host}{match['path']}"


def _mask_urls(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        event[key] = _mask_value(value)
    return event


def _mask_value(value: Any) -> Any:
    if isinstance(value, str):
        return mask_urls(value)
    if isinstance(value, list | tuple):
        return [_mask_value(part) for part in value]
    if isinstance(value, dict):
        return {key: _mask_value(part) for key, part in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    return mask_urls(str(value))  # an exception, a path, a SecretStr (which writes itself as stars)


def _renderer(form: str, colors: bool) -> structlog.typing.Processor:
    if form == "json":
        return structlog.processors.JSONRenderer(ensure_ascii=False)
    return structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)


def _route_standard_library(
    level: int, shared: list[structlog.typing.Processor], renderer: structlog.typing.Processor, lines: _Lines
) -> None:
    """kafka, redis, httpx and obstore log into the same lines, from WARNING on and not too often."""
    handler = _ForeignHandler(lines)
    handler.addFilter(_is_news)
    handler.addFilter(RateLimit(FOREIGN_INTERVAL_S))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder(["suppressed"]), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _ForeignHandler)]:
        root.removeHandler(old)
    handler.setLevel(level)
    root.addHandler(handler)
    # Not `level`: other handlers read warnings too (`kafka_clients` learns from them why a connection failed).
    root.setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of another library says anything.

    That a request was cancelled, as kafka-python reports at ERROR of every client that is closed on purpose while it asks, does
    not: what ends a connection otherwise has a name and an error of its own.
    """
    arguments = record.args if isinstance(record.args, tuple) else ()
    return not (record.name.startswith("kafka.") and any(type(argument).__name__ == "Cancelled" for argument in arguments))


class RateLimit(logging.Filter):
    """Lets one record through for each logger, level and message template in `interval_s`; counts the others in `suppressed`."""

    def __init__(self, interval_s: float, clock: Clock | None = None) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this record is written."""
        now = self._clock.monotonic()
        key = (record.name, record.levelno, str(record.msg)[:200])
        with self._lock:
            last, suppressed = self._seen.get(key, (-self._interval_s, 0))
            if now - last < self._interval_s:
                self._seen[key] = (last, suppressed + 1)
                return False
            if len(self._seen) >= 1000:  # templates with values formatted in: forget rather than grow
                self._seen.clear()
            self._seen[key] = (now, 0)
        if suppressed:
            record.suppressed = suppressed
        return True


class _Lines:
    """Whole lines to one stream, from any thread: the logger at the end of structlog's chain."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def msg(self, message: str) -> None:
        with self._lock:
            try:
                self._stream.write(message + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                # The reader of the logs is gone (broken pipe, closed stream). Moderation goes on without logs; metrics remain.
                return

    debug = info = warning = warn = error = critical = fatal = exception = log = msg


class _ForeignHandler(logging.Handler):
    def __init__(self, lines: _Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
        except Exception:  # noqa: BLE001  a log call of another library with wrong arguments must not reach its caller
            message = self._plain(record)
        self._lines.msg(message)

    def _plain(self, record: logging.LogRecord) -> str:
        return mask_urls(f"{record.levelname} {record.name} {record.msg!r}")
