"""Serving the app with uvicorn: the socket, the signals and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Generator

import uvicorn
from starlette.applications import Starlette

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.log import get_logger
from octavo.server.http1 import bounded_protocol
from octavo.server.state import ServerState

logger = get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BACKLOG = 2048
_CUTOFF_GRACE_S = 3.0  # for the last error events to reach their clients


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket, so that a taken port is known before any weight is read. The port it
    got is `sock.getsockname()[1]`.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named, and with it on every
    # answer takes 40 ms; the listening socket's option holds for what it accepts, too.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((config.host, config.port))
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        raise ConfigError(
            f"Cannot listen on {config.host}:{config.port}: {exc.strerror}. "
            "Choose another --host or --port (0 takes a free one)."
        ) from None
    return sock


async def serve(
    app: Starlette,
    config: ServerConfig,
    sock: socket.socket,
    on_started: Callable[[], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Answer requests on `sock` until SIGTERM, SIGINT or `stop`, then end in order and return.

    On the first of them: no new connections; running requests have `shutdown_timeout_s` to finish,
    after which they are aborted and their clients told so. A second SIGINT ends at once.
    """
    state: ServerState = app.state.octavo
    server = _Server(_uvicorn_config(app, config), state, stop)
    host, port = sock.getsockname()[:2]
    if config.api_key is None and host not in ("127.0.0.1", "::1"):
        logger.warning("listening on %s without --api-key: anybody who reaches it can use it", host)
    logger.info("serving %s on http://%s:%d", state.model_name, host, port)
    gc.collect()
    gc.freeze()  # what start-up made lives on: later collections need not look at it
    if on_started is not None:
        on_started()
    try:
        await server.serve(sockets=[sock])
    finally:
        state.close()


def _uvicorn_config(app: Starlette, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="none",  # the caller's loop runs already
        http=bounded_protocol(config),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,  # the Gate has its own
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=max(int(config.keep_alive_s), 1),
        timeout_graceful_shutdown=int(config.shutdown_timeout_s + _CUTOFF_GRACE_S) + 1,
    )


class _Server(uvicorn.Server):
    """uvicorn's server, less its habit of dying by the signal that it has just handled well: a
    supervisor would see a failure.
    """

    def __init__(
        self, config: uvicorn.Config, state: ServerState, stop: asyncio.Event | None
    ) -> None:
        super().__init__(config)
        self._state = state
        self._stop = stop

    async def on_tick(self, counter: int) -> bool:
        stopped = self._stop is not None and self._stop.is_set()
        return await super().on_tick(counter) or stopped

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        handled = []
        for sig in _SIGNALS:
            try:
                loop.add_signal_handler(sig, self.handle_exit, sig, None)
            except (RuntimeError, ValueError):  # not the main thread: the owner has `stop`
                break
            handled.append(sig)
        try:
            yield
        finally:
            for sig in handled:
                loop.remove_signal_handler(sig)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._state.draining = True
        timeout_s = self._state.config.shutdown_timeout_s
        if self._state.live:
            logger.info(
                "shutting down: %d sequences have %g s to finish", len(self._state.live), timeout_s
            )
        cutoff = asyncio.get_running_loop().call_later(timeout_s, self._state.abort_all)
        try:
            await super().shutdown(sockets)
        finally:
            cutoff.cancel()
