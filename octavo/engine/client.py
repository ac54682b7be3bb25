"""One engine process as its server sees it: the child, and the connection to it. Never imports
torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

from octavo import env, errors
from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs
from octavo.engine.messages import (
    HEADER_BYTES,
    Configure,
    Failed,
    Ping,
    Pong,
    Ready,
    Shutdown,
    ToEngine,
    ToServer,
    encode_frame,
    frame_length,
    to_server_decoder,
)
from octavo.engine.tape import Tape
from octavo.errors import EngineDeadError, EngineError, OctavoError
from octavo.log import Format, get_logger
from octavo.types import EngineInfo

logger = get_logger(__name__)

_SHUTDOWN_S = 5.0
_START_PING_S = 2.0
_START_SILENCE_S = 60.0  # imports from a cold disk hold up even the thread that answers
_DUMP_S = 0.5  # that an engine has to write its stacks before it is killed


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
        self._tape = Tape() if crash_dir is not None else None
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        fds = [theirs.fileno(), *(self._tape.fds if self._tape else ())]
        with theirs:
            try:
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
        self.sock.close()  # which tells it to end
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_SHUTDOWN_S)
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._release()

    def bury(self, cause: Callable[[int | None], str]) -> str:
        """See the child to its end, which has begun, and dump its last steps; returns the cause,
        made from its exit status.
        """
        self.sock.close()
        try:
            self.process.wait(_SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        words = cause(self.process.returncode)
        if self._tape is not None and self._crash_dir is not None:
            try:
                path = self._tape.dump(self._crash_dir, words)
            except OSError as error:
                logger.warning("no flight recording of the dead engine: %s", error)
            else:
                if path is not None:
                    logger.error("its last steps are in %s; see `octavo replay`", path)
        self._release()
        return words

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
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: EngineInfo,
    ) -> None:
        self.info = info
        self._process = process
        self._reader = reader
        self._writer = writer
        self._killed: str | None = None

    @classmethod
    async def open(
        cls, process: EngineProcess, args: EngineArgs, checkpoint: Checkpoint
    ) -> Connection:
        """Tell the process what to run and wait until it is ready.

        Raises:
            OctavoError: what kept the engine from starting; the process has been stopped.
        """
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_connection(sock=process.sock)
            bare = dataclasses.replace(
                checkpoint, tokenizer_json=None, tokenizer_config={}, chat_template=None
            )  # the engine deals in tokens
            writer.write(encode_frame(Configure(args, bare)))
            message = await _first_message(reader, writer)
        except BaseException:
            if writer is not None:
                writer.close()
            process.kill()
            raise
        if isinstance(message, Ready):
            return cls(process, reader, writer, message.info)
        writer.close()
        await asyncio.to_thread(process.stop)
        raise _cause(message, process.process.returncode)

    def send(self, message: ToEngine) -> None:
        """Never blocks; what is said to a process that has ended is lost."""
        self._writer.write(encode_frame(message))

    async def listen(self, take: Callable[[ToServer], None]) -> str:
        """Hand every message to `take` until the process ends; returns the cause of that."""
        message: ToServer | None = None
        nonsense: str | None = None
        try:
            while (message := await _receive(self._reader)) is not None:
                if isinstance(message, Failed):
                    break
                take(message)
        except Exception as error:
            logger.exception("the engine's messages cannot be taken in")
            nonsense = f"{type(error).__name__}: {error}"
            nonsense = f"The engine's messages cannot be taken in: {nonsense}"
        self._writer.close()

        def cause(returncode: int | None) -> str:
            return nonsense or self._killed or str(_cause(message, returncode))

        return await asyncio.to_thread(self._process.bury, cause)

    async def kill(self, cause: str) -> None:
        """Put an end to a process that does not answer; its stacks go to stderr first."""
        self._killed = cause
        self._process.dump_stacks()
        await asyncio.sleep(_DUMP_S)
        self._process.process.kill()

    async def close(self) -> None:
        """Ask the process to end, and see that it does."""
        self.send(Shutdown())
        self._writer.close()
        await asyncio.to_thread(self._process.stop)


async def _first_message(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> ToServer | None:
    """What the process says of its start, which takes as long as it takes, provided that it answers
    pings.

    Raises:
        EngineDeadError: it does not.
    """
    receiving = asyncio.create_task(_receive(reader))
    heard_s = time.monotonic()
    try:
        while True:
            await asyncio.wait((receiving,), timeout=_START_PING_S)
            if receiving.done():
                if not isinstance(message := receiving.result(), Pong):
                    return message
                heard_s = time.monotonic()
                receiving = asyncio.create_task(_receive(reader))
            elif time.monotonic() - heard_s > _START_SILENCE_S:
                raise EngineDeadError(
                    f"The engine process has not answered for {_START_SILENCE_S:g} s of its start."
                )
            else:
                writer.write(encode_frame(Ping()))
    finally:
        receiving.cancel()


async def _receive(reader: asyncio.StreamReader) -> ToServer | None:
    """The next message, or None when the process is gone."""
    try:
        header = await reader.readexactly(HEADER_BYTES)
        payload = await reader.readexactly(frame_length(header))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    message: ToServer = to_server_decoder.decode(payload)
    return message


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
