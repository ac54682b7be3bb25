"""The engine process: `python -m octavo.engine.process FD`, started by `engine.client`.

The main thread runs the step loop and nothing else. One thread reads messages, one writes them, so
that neither a slow server nor a large request holds up a step.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

from octavo import log
from octavo.engine.messages import (
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
    receive,
)
from octavo.errors import OctavoError
from octavo.types import StepOutputs

logger = log.get_logger(__name__)


class Mailbox:
    """The process's end of the socket, with a thread for each direction."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="mailbox-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name="mailbox-reader", daemon=True)
        self._writer.start()
        self._reader.start()

    def send(self, message: ToServer) -> None:
        self._outbox.put(encode_frame(message))

    def receive(self) -> ToEngine | None:
        """Wait for a message; None when the server is gone."""
        return self._inbox.get()

    def drain(self, *, wait: bool) -> Iterator[ToEngine | None]:
        """The messages that have come in; with `wait`, at least one."""
        if wait:
            yield self._inbox.get()
        while True:
            try:
                yield self._inbox.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """Wait until everything sent has left."""
        self._outbox.put(None)
        self._writer.join()

    def _read(self) -> None:
        try:
            while (message := receive(self._sock)) is not None:
                self._inbox.put(message)
        except OSError as error:
            logger.debug("reader ends: %s", error)
        except Exception:
            logger.exception("a message from the server cannot be read")
        self._inbox.put(None)  # deaf is as good as gone: the step loop ends

    def _write(self) -> None:
        try:
            while (frame := self._outbox.get()) is not None:
                self._sock.sendall(frame)
        except OSError as error:
            logger.debug("writer ends: %s", error)


def serve_steps(mailbox: Mailbox, configure: Configure, start_s: float) -> None:
    """Build the engine, then step until the server says stop or is gone."""
    # Imports torch, which takes a second or two; the server prepares its side meanwhile.
    from octavo.engine.build import build_core

    imported_s = time.monotonic()
    core = build_core(configure.args, configure.checkpoint, progress=sys.stderr.isatty())
    core.info.startup_s["import"] = imported_s - start_s
    core.info.startup_s["total"] = time.monotonic() - start_s
    gc.collect()
    gc.freeze()  # what lives now lives for good: no collection needs to look at it again
    mailbox.send(Ready(core.info))
    while True:
        for message in mailbox.drain(wait=not core.has_work and not core.prepare_more()):
            match message:
                case Add(request):
                    core.add(request)
                case Abort(request_ids):
                    if finished := core.abort(request_ids):
                        mailbox.send(Outputs(StepOutputs(finished=finished)))
                case Shutdown() | None:
                    return
                case Configure():
                    raise RuntimeError("a second Configure message")
        if core.has_work and (outputs := core.step()) is not None:
            mailbox.send(Outputs(outputs))


def main(argv: list[str]) -> int:
    """Exit status: 0 after a shutdown, 1 after a failure, which the server was told."""
    start_s = time.monotonic()
    log.setup_logging("engine")
    # Sent to the whole process group (Ctrl-C, systemd), they are the server's to handle: it lets
    # requests finish and then closes the socket, and that ends this process, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mailbox = Mailbox(socket.socket(fileno=int(argv[0])))
    configure = mailbox.receive()
    if not isinstance(configure, Configure):
        return 0  # the server ended before it had anything to run
    try:
        serve_steps(mailbox, configure, start_s)
    except OctavoError as error:
        mailbox.send(Failed(type(error).__name__, str(error)))
    except Exception as error:
        logger.exception("the engine failed")
        mailbox.send(Failed(type(error).__name__, f"{type(error).__name__}: {error}"))
    else:
        return 0
    mailbox.close()
    return 1


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # no waiting for threads that read a socket
