"""Logging: `logger = get_logger(__name__)`. Formatting is set up once, by the process that owns
stderr: as text, or as one JSON object a line.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import time
from types import TracebackType
from typing import Literal, TextIO, cast

from octavo import env

Format = Literal["text", "json"]
Process = Literal["server", "engine", "octavo"]  # octavo: a command that is neither

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CONSOLE = "octavo.console"
# What every record has; all else came in as `extra`.
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}


def get_logger(name: str) -> logging.Logger:
    return logging.getLogger(name)


def get_console() -> logging.Logger:
    """For the few lines that somebody waits for. They come at every OCTAVO_LOG_LEVEL, as text in
    the form "octavo: message".
    """
    return logging.getLogger(_CONSOLE)


def setup_logging(process: Process = "octavo", log_format: str | None = None) -> Format:
    """Log to stderr at OCTAVO_LOG_LEVEL, as text or JSON: as `log_format` has it, or without one
    OCTAVO_LOG_FORMAT. Returns the format.

    Raises:
        ConfigError: one of these variables has a value that it cannot have.
    """
    level = env.get("OCTAVO_LOG_LEVEL")
    if (log_format or env.get("OCTAVO_LOG_FORMAT")) == "text":
        prefix = "engine " if process == "engine" else ""
        _attach("octavo", logging.Formatter(prefix + _TEXT, "%H:%M:%S"), level)
        _attach(_CONSOLE, logging.Formatter("octavo: %(message)s"), "DEBUG")
        return "text"
    formatter = JsonFormatter(process)
    stream = _claim_stderr()
    _attach("octavo", formatter, level, stream)
    _attach(_CONSOLE, formatter, "DEBUG", stream)
    _attach("", formatter, "WARNING", stream)  # other packages' warnings
    _log_what_nobody_caught()
    return "json"


def _attach(
    name: str, formatter: logging.Formatter, level: str, stream: TextIO | None = None
) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.getLogger(name)
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level)


class JsonFormatter(logging.Formatter):
    """One JSON object without a line break. What a call passes as `extra` becomes fields."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
        }
        fields |= {name: v for name, v in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class _Lines(io.TextIOBase):
    """Stands in for `sys.stderr` where all of it is to be JSON: a line that something prints there
    becomes a record. `fileno` is the real one's, for faulthandler.
    """

    def __init__(self, real: TextIO) -> None:
        self.real = real
        self._lock = threading.Lock()
        self._rest = ""
        self._inside = threading.local()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.real.fileno()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        # A log handler that fails says so on stderr, which must not make it fail again.
        if not hasattr(self._inside, "a_write"):
            self._inside.a_write = True
            for line in filter(str.strip, lines):
                logging.getLogger("stderr").warning("%s", line)
            del self._inside.a_write
        return len(text)

    def flush(self) -> None:
        self.real.flush()


def _claim_stderr() -> TextIO:
    """The real stderr, which from now on only log records reach."""
    if isinstance(sys.stderr, _Lines):
        return sys.stderr.real
    real = sys.stderr
    sys.stderr = cast(TextIO, _Lines(real))
    return real


def _log_what_nobody_caught() -> None:
    """Python would print these on stderr, over several lines."""
    logging.captureWarnings(True)
    logger = logging.getLogger("octavo")

    def uncaught(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        logger.critical("uncaught: %s", error or kind.__name__, exc_info=(kind, error, traceback))

    def uncaught_in_thread(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is not None:
            uncaught(failure.exc_type, failure.exc_value, failure.exc_traceback)

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
