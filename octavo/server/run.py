"""The server's life: it answers at once, starts, serves, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any

from octavo.config.server import ServerConfig, is_loopback
from octavo.errors import ConfigError
from octavo.log import get_logger
from octavo.server.app import ADMIN_ROUTES, create_app
from octavo.server.connection import OvertakenError, unless
from octavo.server.keys import KeyRing
from octavo.server.listener import Listener, allow_files, bind
from octavo.server.starting import Front, Starting
from octavo.server.state import ServerState
from octavo.server.tls import load_chain, make_context

logger = get_logger(__name__)

_POLL_S = 0.02
_CUTOFF_S = 3.0  # for the last error events to reach their clients


@dataclass(slots=True)
class Doors:
    """What can be refused before any weight is read: addresses, keys and certificates."""

    config: ServerConfig
    keys: KeyRing
    tls: ssl.SSLContext | None
    sock: socket.socket
    admin_sock: socket.socket | None

    @classmethod
    def open(cls, config: ServerConfig) -> Doors:
        """Raises ConfigError for an address, a key file or a certificate that cannot be used."""
        keys, tls = KeyRing.from_config(config), make_context(config)
        sock, admin_sock = bind(config.host, config.port), None
        if config.admin_port is not None:
            try:
                admin_sock = bind(
                    config.admin_host, config.admin_port, "--admin-host or --admin-port"
                )
            except ConfigError:
                sock.close()
                raise
        return cls(config, keys, tls, sock, admin_sock)

    @property
    def url(self) -> str:
        return self._url(self.config.host, self.sock)

    @property
    def admin_url(self) -> str | None:
        if self.admin_sock is None:
            return None
        return self._url(self.config.admin_host, self.admin_sock)

    def _url(self, host: str, sock: socket.socket) -> str:
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"

    def reload(self) -> None:
        """Read keys and certificate again; what cannot be used changes nothing."""
        with self._complaining("API keys"):
            self.keys.reload()
        if self.tls is not None:
            with self._complaining("certificate"):
                load_chain(self.tls, self.config)
                logger.info("the certificate has been read again")

    @contextlib.contextmanager
    def _complaining(self, what: str) -> Generator[None, None, None]:
        try:
            yield
        except ConfigError as exc:
            logger.error("no change of %s: %s", what, exc)

    def close(self) -> None:
        self.sock.close()
        if self.admin_sock is not None:
            self.admin_sock.close()


class Stop:
    """How the server is told to end: once for in order, twice for now."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.forced = asyncio.Event()
        self.with_grace = False

    def ask(self, *, with_grace: bool = False) -> None:
        """`with_grace` lets balancers notice before connections are refused."""
        if self.asked.is_set():
            self.forced.set()
        else:
            self.with_grace = with_grace
            self.asked.set()

    def drain(self) -> None:
        """Ask with grace; asking again changes nothing."""
        if not self.asked.is_set():
            self.ask(with_grace=True)


async def serve(
    start: Callable[[Starting], Coroutine[Any, Any, ServerState]],
    doors: Doors,
    on_ready: Callable[[ServerState], None] | None = None,
    stop: Stop | None = None,
) -> int:
    """Answer requests until SIGTERM, SIGINT or `stop`, then drain; the number of requests that
    were cut off.

    `start` makes the state with a running engine; what it raises is raised here, too. Until it is
    done, `Starting` answers. A stop that is asked for meanwhile cancels it.
    """
    stop = stop or Stop()
    starting = Starting()
    front, admin_front = Front(starting), Front(starting)
    listeners = [public := Listener(front, doors.config, doors.sock, doors.tls)]
    if doors.admin_sock is not None:
        listeners.append(Listener(admin_front, doors.config, doors.admin_sock, doors.tls))
    _announce(doors)
    try:
        with _signals(stop, doors):
            for listener in listeners:
                listener.open()
            try:
                state = await unless(stop.asked.wait(), start(starting))
            except OvertakenError:
                return 0
            try:
                state.request_drain = stop.drain
                front.app, admin_front.app = create_app(state), create_app(state, ADMIN_ROUTES)
                gc.collect()
                gc.freeze()  # what start-up made lives on: later collections need not look at it
                if on_ready is not None:
                    on_ready(state)
                await stop.asked.wait()
                return await _drain(state, stop, public)
            finally:
                state.close()
    finally:
        for listener in listeners:
            await listener.close()


def _announce(doors: Doors) -> None:
    config = doors.config
    allow_files(config.max_connections)
    if not config.has_keys and not is_loopback(config.host):
        logger.warning(
            "listening on %s without --api-key: anybody who reaches it can use it", config.host
        )
    logger.info("listening on %s; the model loads", doors.url)
    if doors.admin_url is not None:
        logger.info("admin routes on %s", doors.admin_url)


@contextlib.contextmanager
def _signals(stop: Stop, doors: Doors) -> Generator[None, None, None]:
    """SIGTERM and SIGINT stop. SIGHUP reloads where there is something to reload; elsewhere it ends
    the process, as a terminal that is closed expects.
    """
    actions: dict[signal.Signals, Callable[[], None]] = {
        signal.SIGTERM: lambda: stop.ask(with_grace=True),
        signal.SIGINT: stop.ask,
    }
    if doors.config.api_key_file is not None or doors.tls is not None:
        actions[signal.SIGHUP] = doors.reload
    loop = asyncio.get_running_loop()
    handled = []
    for sig, action in actions.items():
        try:
            loop.add_signal_handler(sig, action)
        except (RuntimeError, ValueError):  # not the main thread: the owner has `stop`
            break
        handled.append(sig)
    try:
        yield
    finally:
        for sig in handled:
            loop.remove_signal_handler(sig)


async def _drain(state: ServerState, stop: Stop, public: Listener) -> int:
    """Not ready at once; for a short grace everything goes on, with `Connection: close` on every
    answer, so that a balancer that has not noticed yet loses nothing; then connecting is refused,
    and what runs may finish. Whatever still comes over a kept connection is answered: a POST that
    was sent is one that a balancer does not send again.
    """
    config = state.config
    deadline_s = time.monotonic() + config.drain_timeout_s
    state.draining = True
    logger.info(
        "shutting down: %d requests have %g s to finish",
        len(state.live_requests),
        config.drain_timeout_s,
    )
    if stop.with_grace:
        with contextlib.suppress(TimeoutError):
            grace_s = min(config.drain_grace_s, config.drain_timeout_s)
            await asyncio.wait_for(stop.forced.wait(), grace_s)
    await public.stop_listening()
    while public.is_busy and time.monotonic() < deadline_s and not stop.forced.is_set():
        await asyncio.sleep(_POLL_S)
    num_cut = public.num_answering
    deadline_s = time.monotonic() + _CUTOFF_S
    while public.num_answering and time.monotonic() < deadline_s:
        state.abort_all()  # again and again: some were still on their way to the engine
        await asyncio.sleep(_POLL_S)
    if num_cut:
        logger.warning("%d requests were cut off", num_cut)
    return num_cut
