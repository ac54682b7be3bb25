"""`EngineClient`: the server's end of an engine process. Never imports torch."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from octavo import errors
from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs
from octavo.engine.messages import (
    HEADER_BYTES,
    Abort,
    Add,
    Configure,
    Failed,
    Outputs,
    Ready,
    Shutdown,
    ToEngine,
    ToServer,
    encode_frame,
    frame_length,
    to_server_decoder,
)
from octavo.errors import EngineDeadError, EngineError, OctavoError
from octavo.log import get_logger
from octavo.types import EngineInfo, EngineRequest, Finish, RequestUpdate, StepOutputs

logger = get_logger(__name__)

_SHUTDOWN_S = 5.0


class EngineProcess:
    """A child process and the socket to it. Starting costs nothing: the child imports torch while
    the caller goes on.
    """

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "octavo.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def stop(self) -> None:
        """End the child, by force if it must be."""
        self.sock.close()
        try:
            self.process.wait(_SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Stream:
    """One request's outputs, gathered until its reader takes them."""

    def __init__(self) -> None:
        self._update = RequestUpdate()
        self._arrived = asyncio.Event()

    async def next(self) -> RequestUpdate:
        """Everything received since the last call; waits for at least one event."""
        await self._arrived.wait()
        self._arrived.clear()
        update, self._update = self._update, RequestUpdate()
        return update

    def put(self) -> RequestUpdate:
        """The update to add to; wakes the reader."""
        self._arrived.set()
        return self._update


class EngineClient:
    """Submits requests to one engine process and hands its outputs to their streams."""

    def __init__(self, process: EngineProcess, info: EngineInfo) -> None:
        self.info = info
        self._process = process
        self._streams: dict[int, Stream] = {}
        self._ids = itertools.count(1)
        self._listeners: list[Callable[[StepOutputs], None]] = []
        self._death_callbacks: list[Callable[[], None]] = []
        self._last_message_s = time.monotonic()
        self._death: str | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._task: asyncio.Task[None]

    @classmethod
    async def connect(
        cls, process: EngineProcess, args: EngineArgs, checkpoint: Checkpoint
    ) -> EngineClient:
        """Tell the process what to run and wait until it is ready.

        Raises:
            OctavoError: what kept the engine from starting; the process has been stopped.
        """
        reader, writer = await asyncio.open_connection(sock=process.sock)
        bare = dataclasses.replace(
            checkpoint, tokenizer_json=None, tokenizer_config={}, chat_template=None
        )  # the engine deals in tokens
        writer.write(encode_frame(Configure(args, bare)))
        message = await _receive(reader)
        if not isinstance(message, Ready):
            writer.close()
            await asyncio.to_thread(process.stop)
            raise _startup_error(message, process.process.returncode)
        client = cls(process, message.info)
        client._reader, client._writer = reader, writer
        client._task = asyncio.create_task(client._listen())
        return client

    def on_death(self, callback: Callable[[], None]) -> None:
        """`callback` is called, on the event loop, when the engine process has ended by itself."""
        self._death_callbacks.append(callback)

    @property
    def death(self) -> str | None:
        """Why the engine is gone; None while it is there."""
        return self._death

    @property
    def is_alive(self) -> bool:
        return self._death is None

    @property
    def num_live(self) -> int:
        return len(self._streams)

    @property
    def last_progress_s(self) -> float:
        """time.monotonic() of the last sign of progress; an idle engine is always up to date."""
        return self._last_message_s if self._streams else time.monotonic()

    def next_request_id(self) -> int:
        return next(self._ids)

    def add_listener(self, listener: Callable[[StepOutputs], None]) -> None:
        """`listener` is called with the outputs of every step, on the event loop."""
        self._listeners.append(listener)

    def submit(self, request: EngineRequest) -> Stream:
        """Send a request on its way. Raises EngineDeadError when the engine is gone."""
        if self._death is not None:
            raise EngineDeadError(self._death)
        if not self._streams:
            self._last_message_s = time.monotonic()
        stream = self._streams[request.request_id] = Stream()
        self._send(Add(request))
        return stream

    def abort(self, request_ids: Sequence[int]) -> None:
        live = [request_id for request_id in request_ids if request_id in self._streams]
        if live and self._death is None:
            self._send(Abort(live))

    async def close(self) -> None:
        """Stop the engine; live requests end with an error."""
        self._task.cancel()
        if self._death is None:
            self._send(Shutdown())
            self._die("the server is shutting down")
        self._writer.close()
        await asyncio.to_thread(self._process.stop)

    def _send(self, message: ToEngine) -> None:
        self._writer.write(encode_frame(message))

    async def _listen(self) -> None:
        """Dispatch until the engine ends; then, however that came, end every stream."""
        try:
            message: ToServer | None = None
            while isinstance(message := await _receive(self._reader), Outputs):
                self._last_message_s = time.monotonic()
                self._dispatch(message.outputs)
            returncode = await asyncio.to_thread(self._process.process.wait)
            cause = str(_startup_error(message, returncode))
        except Exception as error:
            logger.exception("the engine's messages cannot be taken in")
            cause = f"The engine's messages cannot be taken in: {type(error).__name__}: {error}"
        logger.error("the engine has ended: %s", cause)
        self._die(cause)
        for callback in self._death_callbacks:
            callback()

    def _dispatch(self, outputs: StepOutputs) -> None:
        streams = self._streams
        for started in outputs.started:
            if (stream := streams.get(started.request_id)) is not None:
                stream.put().started = started
        for request_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
            if (stream := streams.get(request_id)) is not None:
                stream.put().token_ids.append(token_id)
        for request_id, logprobs in outputs.logprobs.items():
            if (stream := streams.get(request_id)) is not None:
                stream.put().logprobs.append(logprobs)
        for request_id, entries in outputs.prompt_logprobs.items():
            if (stream := streams.get(request_id)) is not None:
                stream.put().prompt_logprobs.extend(entries)
        for finish in outputs.finished:
            if (stream := streams.pop(finish.request_id, None)) is not None:
                stream.put().finish = finish
        for listener in self._listeners:
            listener(outputs)

    def _die(self, cause: str) -> None:
        """Every live request gets its terminal message."""
        self._death = cause
        for request_id, stream in self._streams.items():
            stream.put().finish = Finish(request_id, "error", message=cause)
        self._streams.clear()


async def _receive(reader: asyncio.StreamReader) -> ToServer | None:
    """The next message, or None when the process is gone."""
    try:
        header = await reader.readexactly(HEADER_BYTES)
        payload = await reader.readexactly(frame_length(header))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    message: ToServer = to_server_decoder.decode(payload)
    return message


def _startup_error(message: ToServer | None, returncode: int | None) -> OctavoError:
    """The engine's own account of its end, or what its exit status tells."""
    if isinstance(message, Failed):
        kind = getattr(errors, message.kind, None)
        if isinstance(kind, type) and issubclass(kind, OctavoError):
            return kind(message.message)
        return EngineError(message.message)
    died = returncode is not None and returncode < 0
    how = f"signal {-(returncode or 0)}" if died else f"status {returncode}"
    return EngineDeadError(f"The engine process ended with {how} and gave no reason.")
