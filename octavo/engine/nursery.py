"""Where the next engine process comes from."""

from __future__ import annotations

import asyncio

from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs
from octavo.engine.client import Connection, EngineProcess
from octavo.log import get_logger

logger = get_logger(__name__)


class Nursery:
    """Makes engine processes that are like the first. One is made ahead of its time: it has
    imported torch, which takes most of a start, and has nothing else.
    """

    def __init__(
        self,
        first: EngineProcess,
        args: EngineArgs,
        checkpoint: Checkpoint,
        spare_after_s: float | None,
    ) -> None:
        self._another = first.another
        self._args = args
        self._checkpoint = checkpoint
        self._spare_after_s = spare_after_s
        self._spare: EngineProcess | None = None
        self._timer: asyncio.TimerHandle | None = None

    def prepare_soon(self) -> None:
        """Make the spare, but not while the engine has just begun and cores are wanted."""
        if self._spare_after_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._spare_after_s, self._prepare)

    def _prepare(self) -> None:
        try:
            self._spare = self._spare or self._another()
        except OSError as error:
            logger.warning("no spare engine process: %s", error)

    async def open(self) -> Connection:
        """Raises OctavoError or OSError if the engine cannot start."""
        if self._timer is not None:
            self._timer.cancel()
        process, self._spare = self._spare, None
        if process is not None and process.process.poll() is not None:
            process.kill()  # it has died while it waited
            process = None
        return await Connection.open(process or self._another(), self._args, self._checkpoint)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._spare is not None:
            self._spare.kill()
