"""Traces of requests, as the rest of the server sees them. The classes here do nothing: they stand
in where nobody traces, so that no caller asks whether somebody does. `otel` has the others.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from starlette.types import Scope, Send

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.server.generation import Generation


class Trace:
    """One HTTP request, from its headers to the end of its answer."""

    def tokenising(self) -> AbstractContextManager[None]:
        """Around the work that makes token ids of what the client sent."""
        return nullcontext()

    def watch(self, generation: Generation) -> None:
        """Its sequences have been submitted; nothing was read yet."""

    def watch_send(self, send: Send) -> Send:
        """What to send the answer with."""
        return send

    def end(self, route: str, status: int) -> None:
        """The answer has been sent, or cannot be."""


class Tracing:
    """Begins a trace for each request; one per server."""

    def begin(self, scope: Scope) -> Trace:
        """For a request that the gate has let in; `scope["state"]` has its id."""
        return NO_TRACE

    def close(self) -> None:
        """Deliver what was not delivered yet; takes little more than two seconds."""


NO_TRACE = Trace()


def open_tracing(config: ServerConfig, model_name: str) -> Tracing:
    """Raises ConfigError if traces are wanted and the packages for them are missing."""
    if config.otlp_traces_endpoint is None:
        return Tracing()
    try:
        from octavo.server.otel import to_collector
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs the package {error.name!r}: pip install 'octavo[otel]'."
        ) from None
    return to_collector(config.otlp_traces_endpoint, model_name)
