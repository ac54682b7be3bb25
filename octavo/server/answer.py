"""What every generated answer carries, whole or streamed."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing

from msgspec import UNSET, UnsetType
from starlette.requests import Request

from octavo.server.generation import Choice, Generation
from octavo.server.requests import GenerateRequest
from octavo.server.responses import Usage
from octavo.server.sse import EventStream
from octavo.server.state import ServerState
from octavo.text.stream import OutputDelta


class Answer(ABC):
    """Identity, usage and stream options of one response; subclasses give it its shape."""

    id_prefix = ""

    def __init__(
        self, state: ServerState, http: Request, request: GenerateRequest, generation: Generation
    ) -> None:
        self.state = state
        self.request = request
        self.generation = generation
        http.state.live_request.generation = generation
        self.id = f"{self.id_prefix}-{request.request_id or http.state.request_id}"
        self.created = int(time.time())
        self.model = state.check_model(request.model)
        self.fingerprint = state.fingerprint
        options = request.stream_options
        self.ends_with_usage = bool(options and options.include_usage)
        self.usage_everywhere = bool(
            options and options.include_usage and options.continuous_usage_stats
        )
        self._begun: set[int] = set()

    def usage(self) -> Usage:
        return self.generation.usage()

    def chunk_usage(self) -> Usage | UnsetType | None:
        """The usage field of a chunk that is not the last."""
        if self.usage_everywhere:
            return self.usage()
        return None if self.ends_with_usage else UNSET

    def begins(self, choice: Choice) -> bool:
        """True the first time that `choice` is asked about."""
        first = choice.index not in self._begun
        self._begun.add(choice.index)
        return first

    def stream(self, request_id: str) -> EventStream:
        """The answer as events, sent as they come."""
        keep_alive_s = self.state.config.sse_keep_alive_interval_s
        return EventStream(self.events(), self.state.metrics, request_id, keep_alive_s)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The chunks of a streamed answer, those of one update joined to one write."""
        with self.generation:
            async with aclosing(self.generation.outputs()) as outputs:
                async for choice, delta in outputs:
                    if data := self.chunks(choice, delta):
                        yield data
            if self.ends_with_usage:
                yield self.usage_chunk()

    @abstractmethod
    def chunks(self, choice: Choice, delta: OutputDelta) -> bytes:
        """The events that tell of `delta`; none where it says nothing."""

    @abstractmethod
    def usage_chunk(self) -> bytes:
        """The last event, with the final usage and no choices."""
