"""What a front end may ask of an engine. `engine.client` has the real one, tests a scripted one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from octavo.types import EngineInfo, EngineRequest, RequestUpdate, StepOutputs


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
    def is_alive(self) -> bool: ...

    @property
    def last_progress_s(self) -> float:
        """time.monotonic() of the last finished step or idle beat."""
        ...

    @property
    def num_live(self) -> int:
        """Requests submitted and not finished."""
        ...

    def next_request_id(self) -> int: ...

    def submit(self, request: EngineRequest) -> RequestStream:
        """Never blocks. EngineDeadError when the engine is gone."""
        ...

    def abort(self, request_ids: Sequence[int]) -> None:
        """Ends requests early; unknown and finished ids are no error."""
        ...

    def add_listener(self, listener: Callable[[StepOutputs], None]) -> None:
        """`listener` is called after every step, on the event loop."""
        ...

    async def close(self) -> None: ...
