"""What a front end may ask of an engine. `engine.supervisor` has the real one, tests a scripted
one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from octavo.types import EngineCounts, EngineInfo, EngineRequest, RequestUpdate, StepOutputs


class RequestStream(Protocol):
    """The outputs of one submitted request."""

    async def next(self) -> RequestUpdate:
        """Everything received since the last call, merged; waits for at least one event. After an
        update with `.finish` there is nothing more.
        """
        ...


class AsyncEngine(Protocol):
    """One engine as an asyncio front end sees it."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def counts(self) -> EngineCounts: ...

    @property
    def is_alive(self) -> bool:
        """False when it is gone for good."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why no request moves at this moment, in words for an operator; None while all is well."""
        ...

    @property
    def num_live(self) -> int:
        """Requests submitted and not finished."""
        ...

    def next_request_id(self) -> int: ...

    def submit(self, request: EngineRequest) -> RequestStream:
        """Never blocks. EngineDeadError when the engine is gone for good."""
        ...

    def abort(self, request_ids: Sequence[int]) -> None:
        """Ends requests early; unknown and finished ids are no error."""
        ...

    def add_listener(self, listener: Callable[[StepOutputs], None]) -> None:
        """`listener` is called after every step, on the event loop."""
        ...

    async def close(self) -> None: ...
