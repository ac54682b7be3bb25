"""Delivering spans to a collector that may be slow, wrong or away: nobody waits for it, and the log
hears of it once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from octavo.log import get_logger

logger = get_logger(__name__)

_CLOSE_S = 2.0
_GIVE_UP_S = 0.2
_TRACES_PATH = "/v1/traces"  # of the OTLP standard
# What the SDK says of every failed attempt and of every span that it drops.
_TALKATIVE = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")


class CollectorExporter(SpanExporter):
    """OTLP over HTTP; runs in the SDK's thread."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` without a path gets the standard one."""
        parts = urlsplit(endpoint)
        path = _TRACES_PATH if parts.path in ("", "/") else parts.path
        self._exporter = OTLPSpanExporter(parts._replace(path=path).geturl())
        self._is_shut = False
        host = parts.netloc.rpartition("@")[2]  # without a password
        self._once = _SaidOnce(f"{parts.scheme}://{host}{path}")
        for name in _TALKATIVE:
            talkative = logging.getLogger(name)
            talkative.handlers[:] = [self._once]
            talkative.propagate = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            self._once.is_well()
        return result

    def shutdown(self) -> None:
        """Also from another thread: an `export` that waits for its next attempt returns."""
        if not self._is_shut:
            self._is_shut = True
            self._exporter.shutdown()  # type: ignore[no-untyped-call]


class _SaidOnce(logging.Handler):
    """The first complaint since all was well becomes a warning of ours; the others are dropped."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where
        self._complained = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("traces do not reach %s: %s", self._where, record.getMessage())

    def is_well(self) -> None:
        if self._complained:
            self._complained = False
            logger.info("traces reach %s again", self._where)


def close_in_time(shutdown: Callable[[], object], give_up: Callable[[], object]) -> None:
    """`shutdown()`, which delivers what is left; after two seconds `give_up()` ends the waiting
    for another attempt, and what still goes on is left alone.
    """
    thread = threading.Thread(target=shutdown, name="close-traces", daemon=True)
    thread.start()
    thread.join(_CLOSE_S)
    if thread.is_alive():
        logger.warning("traces of the last requests could not be delivered in %g s", _CLOSE_S)
        give_up()
        thread.join(_GIVE_UP_S)
