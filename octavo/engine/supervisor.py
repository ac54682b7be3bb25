"""`Supervisor`: an engine that outlives its processes.

It starts an engine process, watches it, and when it has died or stands still puts another in its
place. The requests that were live go on there, from the prompt and the tokens that they had: their
readers see a pause.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs
from octavo.engine.client import Connection, Death, EngineProcess
from octavo.engine.journal import Entry, Journal
from octavo.engine.messages import Abort, Add, Outputs, Ping, Pong, ToServer
from octavo.engine.nursery import Nursery
from octavo.errors import EngineDeadError, OctavoError
from octavo.log import get_logger
from octavo.types import (
    EngineCounts,
    EngineInfo,
    EngineRequest,
    Finish,
    StepOutputs,
    StepStats,
)

logger = get_logger(__name__)

SPARE_AFTER_S = 5.0  # by then the first requests have been answered
_TICK_S = 0.5
_LAST_DUMP_S = 5.0  # that a dump may still take when the server ends
_ASLEEP_S = 3.0  # a tick that came so late was held up with all of this process
_PING_AFTER_S = 1.5  # of silence
_BACKOFF_S = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # before a restart, by failures in a row
_SLOW_STARTS = 10  # a restart may take so many times as long as the first start
_TRIALS = 16  # deaths beyond the limit that it may take to find a killer among many
_MAX_ISOLATED = 2  # requests in a row that are found to kill, before it must be the engine itself
_SLOW_STEPS = 10  # a step may take so many times as long as the longest of late
_FADE = 0.99  # how the longest step is forgotten, per step


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an engine process may stand still, and how often it may die."""

    step_s: float = 60.0  # for a step, with requests to work on; 0: for ever
    silence_s: float = 10.0  # for the answer to a ping
    start_s: float = 60.0  # for a restart, or ten times what the first start took
    max_restarts: int = 10  # in a row, without a request that got on between them
    spare_after_s: float | None = SPARE_AFTER_S  # until the next process is made; None: never


class Supervisor:
    """An `AsyncEngine` over a sequence of engine processes."""

    def __init__(self, connection: Connection, nursery: Nursery, patience: Patience) -> None:
        self.info = connection.info
        self.counts = EngineCounts()
        self._nursery = nursery
        self._patience = patience
        self._connection: Connection | None = None
        self._journal = Journal()
        self._ids = itertools.count(1)
        self._listeners: list[Callable[[StepOutputs], None]] = []
        self._death_callbacks: list[Callable[[], None]] = []
        self._death: str | None = None
        self._cause = ""  # of the latest death
        self._num_failures = 0  # deaths in a row, without a request that got on between them
        self._num_isolated = 0  # requests found to kill, likewise
        self._dumps: set[asyncio.Task[None]] = set()
        self._longest_step_s = 0.0
        self._reset_clocks()
        self._enter(connection)
        self._task = asyncio.create_task(self._supervise(connection))
        self._watch = asyncio.create_task(self._watch_over())

    @classmethod
    async def start(
        cls,
        process: EngineProcess,
        args: EngineArgs,
        checkpoint: Checkpoint,
        patience: Patience | None = None,
    ) -> Supervisor:
        """Wait until `process` is ready. Later ones are like it.

        Raises:
            OctavoError: what kept the engine from starting; the process has been stopped.
        """
        connection = await Connection.open(process, args, checkpoint)
        # The cache keeps the size that it has: what was promised must still fit, so what left the
        # GPU for its sake must leave it again.
        memory = connection.info.memory_bytes
        same = dataclasses.replace(
            args, kv_cache_memory_bytes=memory.get("kv"), embedding_on_host="host" in memory
        )
        patience = patience or Patience()
        nursery = Nursery(
            process,
            same,
            checkpoint,
            spare_after_s=patience.spare_after_s,
            start_limit_s=max(patience.start_s, _SLOW_STARTS * _start_s(connection.info)),
            silence_s=patience.silence_s,
        )
        return cls(connection, nursery, patience)

    # -- what a front end asks

    @property
    def is_alive(self) -> bool:
        """False once it has given up for good."""
        return self._death is None

    @property
    def death(self) -> str | None:
        """Why there will be no other engine; None while there is one, or will be."""
        return self._death

    @property
    def trouble(self) -> str | None:
        """Why no request moves at this moment; None while all is well."""
        if self._death is not None:
            return "the engine is not running"
        if self._connection is None or not self._connection.is_open:
            return "the engine is being restarted"
        still_s = self._still_s
        if still_s > max(self._patience.silence_s, self._slowest_step_s):
            return f"the engine has made no progress for {still_s:.0f} s"
        return None

    @property
    def num_live(self) -> int:
        return len(self._journal)

    def next_request_id(self) -> int:
        return next(self._ids)

    def add_listener(self, listener: Callable[[StepOutputs], None]) -> None:
        """`listener` is called with the outputs of every step, on the event loop."""
        self._listeners.append(listener)

    def on_death(self, callback: Callable[[], None]) -> None:
        """`callback` is called, on the event loop, when there will be no other engine."""
        self._death_callbacks.append(callback)
        if self._death is not None:
            callback()

    def submit(self, request: EngineRequest) -> Entry:
        """Send a request on its way, or keep it until there is an engine. Raises EngineDeadError
        when there will be none.
        """
        if self._death is not None:
            raise EngineDeadError(self._death)
        if not len(self._journal):
            self._progress_s = time.monotonic()
        entry = self._journal.add(request)
        self._admit()
        return entry

    def abort(self, request_ids: Sequence[int]) -> None:
        """They end now; the engine is told, and what it still says of them is ignored."""
        in_engine = []
        for request_id in request_ids:
            if (entry := self._journal.get(request_id)) is not None:
                self._journal.finish(Finish(request_id, "abort"))
                if entry.in_engine:
                    in_engine.append(request_id)
        if in_engine and self._connection is not None:
            self._connection.send(Abort(in_engine))
        if self._journal.has_waiting:  # it may have been what they waited for
            self._admit()

    async def close(self) -> None:
        """Stop the engine; live requests end with an error."""
        self._give_up("the server is shutting down")
        self._watch.cancel()
        self._task.cancel()
        await asyncio.wait((self._watch, self._task))
        await self._nursery.close()
        if self._connection is not None:
            await self._connection.close()
        if self._dumps:
            await asyncio.wait(self._dumps, timeout=_LAST_DUMP_S)

    # -- one process after the other

    async def _supervise(self, connection: Connection) -> None:
        try:
            while True:
                last_words = await connection.listen(self._take)
                died_s = time.monotonic()
                death = await connection.autopsy(last_words)
                self._connection = None
                self._cause = death.cause
                logger.error("the engine has ended: %s", self._cause)
                self._dump_aside(connection)
                self._bury(death)
                successor = await self._restart()
                if successor is None:
                    break
                connection = successor
                self._enter(connection)
                self.counts.last_recovery_s = time.monotonic() - died_s
                logger.warning("the engine is back after %.1f s", self.counts.last_recovery_s)
        except Exception as error:
            logger.exception("the supervisor failed")
            self._cause = f"The supervisor failed: {type(error).__name__}: {error}"
        if self._dumps:
            await asyncio.wait(self._dumps, timeout=_LAST_DUMP_S)
        self._give_up(self._cause)
        for callback in self._death_callbacks:
            callback()

    def _dump_aside(self, connection: Connection) -> None:
        """No restart waits for a disk."""
        task = asyncio.create_task(connection.dump(self._cause))
        self._dumps.add(task)
        task.add_done_callback(self._dumps.discard)

    def _enter(self, connection: Connection) -> None:
        self._connection = connection
        self._reset_clocks()
        self._nursery.prepare_soon(sooner=self._num_failures > 0)
        self._admit()

    def _reset_clocks(self) -> None:
        self._heard_s = self._progress_s = time.monotonic()
        self._ping_s: float | None = None  # when a ping was sent that is not answered yet

    def _bury(self, death: Death) -> None:
        """Settle what a death means for the requests that were there."""
        self._num_failures += 1
        if (killer := self._journal.bury(death.in_flight, was_killed=death.was_killed)) is not None:
            self._num_isolated += 1
            self._isolate(killer)
        stats = StepStats(num_waiting=len(self._journal))
        self._tell(StepOutputs(stats=stats))

    def _isolate(self, killer: Entry) -> None:
        request_id = killer.request.request_id
        if self._num_isolated > _MAX_ISOLATED:
            # Nobody has got on since the first of them: no killer, but a broken engine.
            self._num_failures = self._patience.max_restarts + _TRIALS + 1
            return
        self.counts.num_isolated += 1
        logger.error("request %d ends the engine whenever it is tried, and is given up", request_id)
        message = (
            "This request has ended the engine more than twice, at last when it was tried alone. "
            "It is given up."
        )
        self._journal.finish(Finish(request_id, "error", message=message))

    @property
    def _may_restart(self) -> bool:
        limit = self._patience.max_restarts
        if limit and self._is_trial:
            limit += _TRIALS
        return self._num_failures <= limit

    @property
    def _is_trial(self) -> bool:
        """Are suspects told apart?"""
        return bool(self._num_isolated) or self._journal.is_waiting_for_trial

    async def _restart(self) -> Connection | None:
        """Another engine, ready to work; None if it is to be left at that."""
        while self._may_restart:
            # In a trial each death says something: no need to wait.
            failures = 1 if self._is_trial else self._num_failures
            delay_s = _BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1]
            logger.warning(
                "restarting the engine%s; %d requests wait",
                f" in {delay_s:g} s" if delay_s else "",
                len(self._journal),
            )
            await asyncio.sleep(delay_s)
            try:
                connection = await self._nursery.open()
            except Exception as error:
                known = isinstance(error, OctavoError | OSError)
                self._cause = str(error) if known else f"{type(error).__name__}: {error}"
                self._num_failures += 1
                logger.error("the engine did not start: %s", self._cause)
                continue
            self.counts.num_restarts += 1
            return connection
        return None

    def _give_up(self, cause: str) -> None:
        """Every live request gets its terminal message."""
        if self._death is not None:
            return
        self._death = cause
        for entry in self._journal:
            self._journal.finish(Finish(entry.request.request_id, "error", message=cause))

    # -- to and from the process

    def _admit(self) -> None:
        """Send the engine what it may have now."""
        if self._connection is None or not self._connection.is_open:
            return
        for entry in self._journal.admit():
            if entry.request.max_total_len > self._connection.info.max_model_len:
                message = "The restarted engine has too little memory for this request."
                self._journal.finish(Finish(entry.request.request_id, "error", message=message))
                continue
            self.counts.num_resumed += entry.has_entered
            self._connection.send(Add(entry.enter()))

    def _take(self, message: ToServer) -> None:
        now_s = time.monotonic()
        match message:
            case Outputs(outputs):
                if self._num_failures and self._journal.shows_success(outputs):
                    self._num_failures = self._num_isolated = 0
                self._journal.record(outputs)
                self._tell(outputs)
                step_s = outputs.stats.step_s
                self._longest_step_s = max(self._longest_step_s * _FADE, step_s)
                self._progress_s = now_s
                if self._journal.has_waiting:
                    self._admit()
            case Pong():
                self._ping_s = None
            case _:
                raise ValueError(f"an unexpected {type(message).__name__} message")
        self._heard_s = now_s

    def _tell(self, outputs: StepOutputs) -> None:
        for listener in self._listeners:
            listener(outputs)

    # -- the watchdog

    @property
    def _still_s(self) -> float:
        """Seconds since the last step; an idle engine is always up to date."""
        return time.monotonic() - self._progress_s if len(self._journal) else 0.0

    @property
    def _slowest_step_s(self) -> float:
        return _SLOW_STEPS * self._longest_step_s

    async def _watch_over(self) -> None:
        """Put an end to a process that has stopped answering or stepping."""
        woke_s = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            before_s, woke_s = woke_s, time.monotonic()
            if woke_s - before_s > _ASLEEP_S:  # this process stood still, not the engine
                self._reset_clocks()
            connection = self._connection
            if connection is None or not connection.is_open:
                continue
            if (cause := self._check(connection)) is not None:
                logger.error("%s Its stacks follow, as far as it can still write them.", cause)
                try:
                    await connection.kill(cause)
                except OSError as error:
                    logger.warning("it cannot be killed: %s", error)

    def _check(self, connection: Connection) -> str | None:
        """Why the process must go, if it must."""
        now_s, patience = time.monotonic(), self._patience
        if self._ping_s is None and now_s - self._heard_s > _PING_AFTER_S:
            self._ping_s = now_s
            connection.send(Ping())
        if self._ping_s is not None and now_s - self._ping_s > patience.silence_s:
            return f"The engine process has not answered for {now_s - self._heard_s:.0f} s."
        still_s = self._still_s
        limit_s = max(patience.step_s or math.inf, self._slowest_step_s)
        if self._journal.num_in_engine and still_s > limit_s:
            return f"The engine has finished no step for {still_s:.0f} s."
        return None


def _start_s(info: EngineInfo) -> float:
    """What a start takes, also if packed weights are not found in their cache any more."""
    return info.startup_s.get("total", 0.0) + info.startup_s.get("saved", 0.0)
