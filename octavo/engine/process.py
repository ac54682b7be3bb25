"""The engine process: `python -m octavo.engine.process SOCKET [TAPE TAPE]`, file descriptors that
it inherits from `engine.client`.

The main thread runs the step loop and nothing else. One thread reads messages, one writes them, so
that neither a slow server nor a large request holds up a step.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from octavo import log
from octavo.engine.messages import (
    Abort,
    Add,
    Configure,
    Failed,
    Outputs,
    Ping,
    Pong,
    Ready,
    Shutdown,
    ToEngine,
    ToServer,
    encode_frame,
    receive,
)
from octavo.errors import OctavoError
from octavo.types import EngineRequest, Finish, StepOutputs

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.engine.core import EngineCore, Runner
    from octavo.engine.recording import Recorder

logger = log.get_logger(__name__)

_STUCK_S = 5.0  # that a step has to end once the server is gone


class Mailbox:
    """The process's end of the socket, with a thread for each direction.

    Pings are answered by the thread that reads: the answer says that the process runs, not that
    its steps do.
    """

    def __init__(self, sock: socket.socket, on_end: Callable[[], object] = lambda: None) -> None:
        """`on_end` is called, in a thread, when nothing more can come in."""
        self._sock = sock
        self._on_end = on_end
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
                if isinstance(message, Ping):
                    self.send(Pong())
                else:
                    self._inbox.put(message)
        except OSError as error:
            logger.debug("reader ends: %s", error)
        except Exception:
            logger.exception("a message from the server cannot be read")
        self._inbox.put(None)  # deaf is as good as gone: the step loop ends
        self._on_end()

    def _write(self) -> None:
        try:
            while (frame := self._outbox.get()) is not None:
                self._sock.sendall(frame)
        except OSError as error:
            logger.debug("writer ends: %s", error)


BuildParts = Callable[[Configure], "tuple[EngineConfig, Runner]"]


def load_parts() -> BuildParts:
    """Import what an engine is made of, torch above all, which takes a second or two: the server
    prepares its side meanwhile. Without the collector, which would go through all of it time and
    again (2.0 s instead of 1.4) and have nothing to collect.
    """
    start_s = time.monotonic()
    gc.disable()
    from octavo.engine.build import build_runner

    gc.freeze()
    gc.enable()
    import_s = time.monotonic() - start_s

    def build(configure: Configure) -> tuple[EngineConfig, Runner]:
        start_s = time.monotonic()
        config, runner = build_runner(
            configure.args, configure.checkpoint, progress=sys.stderr.isatty()
        )
        runner.report.seconds["import"] = import_s
        runner.report.seconds["total"] = import_s + time.monotonic() - start_s
        return config, runner

    return build


def run_engine(
    mailbox: Mailbox, configure: Configure, build: BuildParts, fds: Sequence[int]
) -> None:
    """Build the engine and serve; its steps are recorded in `fds`, if there are any."""
    from octavo.engine.core import EngineCore
    from octavo.engine.recording import RecordedRunner, Recorder

    config, runner = build(configure)
    recorder = Recorder(fds, configure.args) if fds else None
    core = EngineCore(config, RecordedRunner(runner, recorder) if recorder else runner)
    serve_steps(mailbox, core, recorder)


def add(core: EngineCore, request: EngineRequest, mailbox: Mailbox) -> None:
    """A request that cannot even be taken in harms nobody else."""
    try:
        core.add(request)
    except Exception as error:
        logger.exception("request %d cannot be taken in", request.request_id)
        message = f"The engine cannot take this request in: {type(error).__name__}: {error}"
        finish = Finish(request.request_id, "error", message=message)
        mailbox.send(Outputs(StepOutputs(finished=[finish], stats=core.stats)))


def serve_steps(mailbox: Mailbox, core: EngineCore, recorder: Recorder | None = None) -> None:
    """Step until the server says stop or is gone."""
    if recorder is not None:
        recorder.begin(core.info, [], [])
    gc.collect()
    gc.freeze()  # what lives now lives for good: no collection needs to look at it again
    mailbox.send(Ready(core.info))
    while True:
        for message in mailbox.drain(wait=not core.has_work and not core.prepare_more()):
            match message:
                case Add(request):
                    add(core, request, mailbox)
                case Abort(request_ids):
                    mailbox.send(Outputs(core.abort(request_ids)))
                case Shutdown() | None:
                    return
                case _:
                    raise RuntimeError(f"an unexpected {type(message).__name__} message")
        if core.has_work and (outputs := core.step()) is not None:
            mailbox.send(Outputs(outputs))
        if recorder is not None and recorder.is_full:
            recorder.begin(core.info, core.snapshot(), core.plans_in_flight)


def _exit_soon() -> None:
    """Without a server, end: the step loop by itself, or else, where it is stuck, without it."""
    timer = threading.Timer(_STUCK_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


def main(argv: list[str], load: Callable[[], BuildParts] = load_parts) -> int:
    """Exit status: 0 after a shutdown, 1 after a failure, which the server was told."""
    log.setup_logging("engine")
    # Sent to the whole process group (Ctrl-C, systemd), they are the server's to handle: it lets
    # requests finish and then closes the socket, and that ends this process, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the supervisor asks for stacks before it kills
    fds = [int(fd) for fd in argv]
    for fd in fds:  # whatever this process starts must not hold them open when it is gone
        os.set_inheritable(fd, False)
    mailbox = Mailbox(socket.socket(fileno=fds[0]), on_end=_exit_soon)
    try:
        build = load()
        configure = mailbox.receive()
        if isinstance(configure, Configure):
            run_engine(mailbox, configure, build, fds[1:])
        return 0  # the server said so, or is gone
    except OctavoError as error:
        mailbox.send(Failed(type(error).__name__, str(error)))
    except Exception as error:
        logger.exception("the engine failed")
        mailbox.send(Failed(type(error).__name__, f"{type(error).__name__}: {error}"))
    mailbox.close()
    return 1


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # no waiting for threads that read a socket
