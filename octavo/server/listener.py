"""A listening socket and what hangs on it: uvicorn's HTTP protocol under a life of our own.

uvicorn's `Server` closes idle connections the moment it is asked to stop, drops those that it has
not accepted yet, and dies by the signal that it has just handled well. A balancer in front loses
requests by each of the first two, and a supervisor sees a failure in the third. asyncio's own
`Server` forgets a connection that it accepts just before it is closed; so accept() is called here.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import time
from email.utils import formatdate

import uvicorn
from uvicorn.server import ServerState as UvicornState

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.log import get_logger
from octavo.server.http1 import BoundedProtocol, bounded_protocol
from octavo.server.starting import Front

logger = get_logger(__name__)

_BACKLOG = 2048
_SPARE_FILES = 256  # beside one per connection
_POLL_S = 0.02
_RETRY_ACCEPT_S = 1.0
_WELCOME_S = 1.0
_FLUSH_S = 3.0  # for the last bytes and TLS's goodbye


def bind(host: str, port: int, flags: str = "--host or --port") -> socket.socket:
    """A listening socket, so that a taken port is known before any weight is read. The port it
    got is `sock.getsockname()[1]`.

    Raises:
        ConfigError: the address cannot be had; names `flags`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named, and with it on every
    # answer takes 40 ms; the listening socket's option holds for what it accepts, too.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {exc.strerror}. "
            f"Choose another {flags} (port 0 takes a free one)."
        ) from None
    return sock


def allow_files(num_connections: int) -> None:
    """Raise this process's limit of open files to what so many connections need."""
    needed = num_connections + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logger.warning(
            "%d connections need %d open files and only %d are allowed: raise ulimit -n, or lower "
            "--max-connections",
            *(num_connections, needed, allowed),
        )


class Listener:
    def __init__(
        self, front: Front, config: ServerConfig, sock: socket.socket, tls: ssl.SSLContext | None
    ) -> None:
        self._sock = sock
        self._is_open = False
        self._tls = tls
        self._handshake_s = config.read_timeout_s or None
        self._protocol_class = bounded_protocol(config)
        self._uvicorn = uvicorn.Config(
            front,
            loop="none",  # the caller's loop runs already
            http=self._protocol_class,
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,  # the Gate has its own
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(int(config.keep_alive_s), 1),
        )
        self._uvicorn.load()
        self._state = UvicornState()
        self._welcomes: set[asyncio.Task[None]] = set()
        self._clock: asyncio.Task[None] | None = None

    @property
    def num_answering(self) -> int:
        """Requests whose answer is not complete."""
        return len(self._state.tasks)

    @property
    def is_busy(self) -> bool:
        return bool(self._state.tasks) or any(not c.is_idle for c in self._connections())

    def _connections(self) -> list[BoundedProtocol]:
        return [c for c in self._state.connections if isinstance(c, BoundedProtocol)]

    def _protocol(self) -> BoundedProtocol:
        return self._protocol_class(self._uvicorn, self._state, app_state={})

    def open(self) -> None:
        self._clock = asyncio.create_task(self._keep_date())
        self._is_open = True
        self._listen()

    def _listen(self) -> None:
        if self._is_open:
            asyncio.get_running_loop().add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        """Take every connection that the kernel has completed."""
        while True:
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue  # before it was taken
            except OSError as exc:  # no files left, or no memory
                logger.error("cannot take connections for a moment: %s", exc.strerror)
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._sock)
                loop.call_later(_RETRY_ACCEPT_S, self._listen)
                return
            sock.setblocking(False)
            task = asyncio.create_task(self._welcome(sock))
            self._welcomes.add(task)
            task.add_done_callback(self._welcomes.discard)

    async def _welcome(self, sock: socket.socket) -> None:
        loop, handshake_s = asyncio.get_running_loop(), self._handshake_s if self._tls else None
        try:
            await loop.connect_accepted_socket(
                self._protocol, sock, ssl=self._tls, ssl_handshake_timeout=handshake_s
            )
        except (OSError, TimeoutError) as exc:
            logger.debug("a connection failed before its first request: %s", exc)

    async def _keep_date(self) -> None:
        while True:
            self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            await asyncio.sleep(1.0)

    async def stop_listening(self) -> None:
        """From now on connecting is refused. Connections that the kernel has completed are taken
        first: it would reset them, with the requests that they carry.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._accept()
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        if self._welcomes:
            await asyncio.wait(self._welcomes, timeout=_WELCOME_S)
        await asyncio.sleep(_POLL_S)  # what they sent is read before anybody asks `is_busy`

    async def close(self) -> None:
        """End what is left, giving bytes on their way a moment to arrive."""
        await self.stop_listening()
        if self._clock is not None:
            self._clock.cancel()
        for task in self._state.tasks | self._welcomes:
            task.cancel()
        for connection in self._connections():
            connection.transport.close()
        deadline_s = time.monotonic() + _FLUSH_S
        while (self._state.connections or self._state.tasks) and time.monotonic() < deadline_s:
            await asyncio.sleep(_POLL_S)
        for connection in self._connections():
            connection.transport.abort()
        await asyncio.sleep(0)
