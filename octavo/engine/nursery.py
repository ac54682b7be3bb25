"""Where the next engine process comes from."""

from __future__ import annotations

import asyncio

from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs
from octavo.engine.client import START_SILENCE_S, Connection, EngineProcess
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
        *,
        spare_after_s: float | None,
        start_limit_s: float,
        silence_s: float,
    ) -> None:
        """Starts may take `start_limit_s`; the spare, which has imported all it needs, may leave a
        ping unanswered for `silence_s`.
        """
        self._another = first.another
        self._args = args
        self._checkpoint = checkpoint
        self._spare_after_s = spare_after_s
        self._start_limit_s = start_limit_s
        self._silence_s = silence_s
        self._spare: EngineProcess | None = None
        self._timer: asyncio.TimerHandle | None = None

    def prepare_soon(self, *, sooner: bool = False) -> None:
        """Make the spare, but not while the engine has just begun and cores are wanted; `sooner`
        after a death, since one is often followed by another.
        """
        if self._spare_after_s is not None:
            loop = asyncio.get_running_loop()
            delay_s = self._spare_after_s / 5 if sooner else self._spare_after_s
            self._timer = loop.call_later(delay_s, self._prepare)

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
        silence_s = self._silence_s
        if process is not None and process.process.poll() is not None:
            process.kill()  # it has died while it waited
            process = None
        if process is None:
            process, silence_s = self._another(), START_SILENCE_S
        return await Connection.open(
            process,
            self._args,
            self._checkpoint,
            limit_s=self._start_limit_s,
            silence_s=silence_s,
        )

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._spare is not None:
            await asyncio.to_thread(self._spare.kill)
