"""One engine process as its server sees it: the child, and the connection to it. Never imports
torch.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import msgspec

from octavo import env, errors
from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs
from octavo.engine.channel import Channel
from octavo.engine.messages import (
    Configure,
    Failed,
    Ping,
    Pong,
    Ready,
    Shutdown,
    ToEngine,
    ToServer,
)
from octavo.engine.tape import Span, Tape
from octavo.errors import EngineDeadError, EngineError, OctavoError
from octavo.log import Format, get_logger
from octavo.types import EngineInfo

logger = get_logger(__name__)

_SHUTDOWN_S = 5.0
_START_PING_S = 2.0
START_SILENCE_S = 60.0  # imports from a cold disk hold up even the thread that answers
_DUMP_S = 0.5  # that an engine has to write its stacks before it is killed


@dataclass(frozen=True, slots=True)
class Death:
    """The end of an engine process."""

    cause: str
    was_killed: bool  # by SIGKILL: it need not have been its own doing
    in_flight: dict[int, Span] | None  # what its last steps computed; None if that is not known


class EngineProcess:
    """A child process and the socket to it. Starting costs nothing: the child imports torch while
    the caller goes on.

    The socket is one of a pair, without a name: no other process can open it.
    """

    command: ClassVar[tuple[str, ...]] = (sys.executable, "-m", "octavo.engine.process")

    def __init__(self, crash_dir: Path | None = None, log_format: Format = "text") -> None:
        """With `crash_dir`, the child's last steps are kept, and dumped there on its death.

        Raises:
            OSError: there are too many files or processes.
        """
        self._crash_dir = crash_dir
        self._log_format: Format = log_format
        self._tape: Tape | None = None
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self._tape = Tape() if crash_dir is not None else None
                fds = [theirs.fileno(), *(self._tape.fds if self._tape else ())]
                self.process = subprocess.Popen(
                    [*self.command, *map(str, fds)],
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    env=env.with_values(OCTAVO_LOG_FORMAT=log_format),
                )
            except BaseException:
                self._release()
                raise

    def another(self) -> Self:
        """A fresh process of the same kind."""
        return type(self)(self._crash_dir, self._log_format)

    def stop(self) -> None:
        """End the child, by force if it must be."""
        self._reap()
        self._release()

    def kill(self) -> None:
        self.process.kill()
        self.stop()

    def _reap(self) -> None:
        """Wait for the end of the child, which a closed socket tells to end. One that even a kill
        does not end (it waits for a driver) is left behind.
        """
        self.sock.close()
        try:
            self.process.wait(_SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            try:
                self.process.wait(_SHUTDOWN_S)
            except subprocess.TimeoutExpired:
                logger.error("process %d cannot be killed and is left behind", self.process.pid)

    def autopsy(self) -> dict[int, Span] | None:
        """See the child to its end, which has begun; what its last steps computed, or None if that
        is not known.
        """
        self._reap()
        try:
            return self._tape.in_flight() if self._tape is not None else None
        except (msgspec.MsgspecError, KeyError) as error:  # it may have died of bad memory
            logger.warning("the flight recording makes no sense: %s", error)
            return None

    def dump(self, cause: str) -> None:
        """Write the dead child's last steps to `crash_dir`, and let go of it."""
        try:
            if self._tape is not None and self._crash_dir is not None:
                path = self._tape.dump(self._crash_dir, cause)
                if path is not None:
                    logger.error("the engine's last steps are in %s; see `octavo replay`", path)
        except OSError as error:
            logger.warning("no flight recording of the dead engine: %s", error)
        finally:
            self._release()

    def _release(self) -> None:
        self.sock.close()
        if self._tape is not None:
            self._tape.close()

    def dump_stacks(self) -> None:
        """Have the child write every thread's stack to stderr, if it still can."""
        self.process.send_signal(signal.SIGUSR1)


class Connection:
    """What is said to and by one engine process, from its configuration to its end."""

    def __init__(
        self,
        process: EngineProcess,
        channel: Channel,
        info: EngineInfo,
    ) -> None:
        self.info = info
        self._process = process
        self._channel = channel
        self._killed: str | None = None
        self._gave_up = asyncio.Event()

    @classmethod
    async def open(
        cls,
        process: EngineProcess,
        args: EngineArgs,
        checkpoint: Checkpoint,
        *,
        limit_s: float = math.inf,
        silence_s: float = START_SILENCE_S,
    ) -> Connection:
        """Tell the process what to run and wait until it is ready.

        Args:
            limit_s: how long that may take.
            silence_s: how long it may leave a ping unanswered meanwhile.

        Raises:
            OctavoError: what kept the engine from starting; the process has been stopped.
        """
        channel = Channel(process.sock)
        try:
            bare = dataclasses.replace(
                checkpoint, tokenizer_json=None, tokenizer_config={}, chat_template=None
            )  # the engine deals in tokens
            channel.send(Configure(args, bare))
            message = await _first_message(channel, limit_s, silence_s)
            if isinstance(message, Ready):
                return cls(process, channel, message.info)
            channel.close()
            await asyncio.to_thread(process.stop)
            raise _cause(message, process.process.returncode)
        except BaseException:
            channel.close()
            if process.process.poll() is None:
                process.dump_stacks()
            await asyncio.shield(asyncio.to_thread(process.kill))
            raise

    @property
    def is_open(self) -> bool:
        """False from the moment that the process is seen to end."""
        return self._channel.is_open

    def send(self, message: ToEngine) -> None:
        """Never blocks; what is said to a process that has ended is lost."""
        self._channel.send(message)

    async def listen(self, take: Callable[[ToServer], None]) -> str:
        """Hand every message to `take` until the process ends, or is given up; returns what it
        said of that itself, or else nothing.
        """
        listening = asyncio.create_task(self._listen(take))
        given_up = asyncio.create_task(self._gave_up.wait())
        try:
            await asyncio.wait((listening, given_up), return_when=asyncio.FIRST_COMPLETED)
            return listening.result() if listening.done() else ""
        finally:
            self._channel.close()
            for task in (listening, given_up):
                task.cancel()
            await asyncio.wait((listening, given_up))

    async def _listen(self, take: Callable[[ToServer], None]) -> str:
        try:
            while (message := await self._channel.next()) is not None:
                if isinstance(message, Failed):
                    return str(_cause(message, None))
                take(message)
        except Exception as error:
            logger.exception("the engine's messages cannot be taken in")
            return f"The engine's messages cannot be taken in: {type(error).__name__}: {error}"
        return ""

    async def autopsy(self, last_words: str) -> Death:
        """What there is to know of the end of the process; waits for it."""
        in_flight = await asyncio.to_thread(self._process.autopsy)
        status = self._process.process.returncode
        known = self._killed or last_words
        was_killed = not known and status == -signal.SIGKILL
        return Death(known or str(_cause(None, status)), was_killed, in_flight)

    async def dump(self, cause: str) -> None:
        """Write a dead process's last steps down."""
        await asyncio.to_thread(self._process.dump, cause)

    async def kill(self, cause: str) -> None:
        """Put an end to a process that does not answer; its stacks go to stderr first. `listen`
        returns, whatever the process does.
        """
        self._killed = cause
        self._process.dump_stacks()
        await asyncio.sleep(_DUMP_S)
        self._process.process.kill()
        self._gave_up.set()

    async def close(self) -> None:
        """Ask the process to end, and see that it does."""
        self.send(Shutdown())
        self._channel.close()
        await asyncio.to_thread(self._process.stop)


async def _first_message(channel: Channel, limit_s: float, silence_s: float) -> ToServer | None:
    """What the process says of its start.

    Raises:
        EngineDeadError: it takes too long, or does not answer pings.
    """
    receiving = asyncio.create_task(channel.next())
    heard_s = begun_s = time.monotonic()
    try:
        while True:
            done, _ = await asyncio.wait((receiving,), timeout=min(_START_PING_S, silence_s / 2))
            now_s = time.monotonic()
            if done:
                if not isinstance(message := receiving.result(), Pong):
                    return message
                heard_s = now_s
                receiving = asyncio.create_task(channel.next())
            if now_s - begun_s > limit_s:
                raise EngineDeadError(f"The engine was not ready after {limit_s:.0f} s.")
            if now_s - heard_s > silence_s:
                raise EngineDeadError(
                    f"The engine process has not answered for {silence_s:g} s of its start."
                )
            if not done:  # an answer is no reason to ask again at once
                channel.send(Ping())
    finally:
        receiving.cancel()
        await asyncio.wait((receiving,))


def _cause(message: ToServer | None, returncode: int | None) -> OctavoError:
    """The engine's own account of its end, or what its exit status tells."""
    if isinstance(message, Failed):
        kind = getattr(errors, message.kind, None)
        if isinstance(kind, type) and issubclass(kind, OctavoError):
            return kind(message.message)
        return EngineError(message.message)
    died = returncode is not None and returncode < 0
    how = f"signal {-(returncode or 0)}" if died else f"status {returncode}"
    return EngineDeadError(f"The engine process ended with {how} and gave no reason.")
