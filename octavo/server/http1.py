"""HTTP/1.1 with bounds, below ASGI; and what a drain asks of a connection."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import http
import termios
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from octavo.config.server import ServerConfig
from octavo.log import get_logger
from octavo.server.errors import ApiError, ErrorBody
from octavo.server.gate import SECURITY_HEADERS, header_too_large

logger = get_logger(__name__)

_LINGER_S = 1.0
_FIRST_REQUEST_S = 1.0  # who connects is about to send something, if not at once
# Connections over the bound, on which probes alone are answered: a flood must not look like a
# server that is dead. Over these, too, connections are cut.
_SURPLUS_CONNECTIONS = 64
_STANDING = b"".join(b"%s: %s\r\n" % pair for pair in SECURITY_HEADERS)


def bounded_protocol(config: ServerConfig) -> type[BoundedProtocol]:
    """A protocol class with the bounds of `config`."""
    bounds = {
        "max_connections": config.max_connections,
        "max_header_bytes": config.max_header_bytes,
        "read_timeout_s": config.read_timeout_s,
        "write_timeout_s": config.write_timeout_s,
    }
    return type("Protocol", (BoundedProtocol,), bounds)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds that it lacks: connections, bytes of the head, time to send
    it, time to read the answer.
    """

    max_connections: int
    max_header_bytes: int
    read_timeout_s: float
    write_timeout_s: float  # 0: no limit
    _is_surplus = False
    _has_begun = False  # a first message
    _connected_s = 0.0
    _in_head = True
    _head_began = False
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._connected_s = self.loop.time()
        num_surplus = len(self.connections) - self.max_connections
        self._is_surplus = num_surplus > 0
        if num_surplus > _SURPLUS_CONNECTIONS:
            transport.abort()
        self._start_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun = True
        if self._is_surplus:
            self.scope["state"]["is_surplus"] = True
        if not self._in_head:
            self._start_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._head_began = False
        super().data_received(data)
        # Data in which a head began holds the end of a former request too: not counted.
        if self._in_head and not self._head_began and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self.max_header_bytes:
                self._refuse(header_too_large(self.max_header_bytes))

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, f"{msg} Send HTTP/1.1.", "invalid_http"))

    def pause_writing(self) -> None:
        """The transport holds more than it should: the client does not read, or slowly."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_closing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_closing()

    def _watch_closing(self) -> None:
        """A connection closes when the rest of the answer was sent, which may be never."""
        if self._write_timer is None:
            self._watch_writing()

    def _watch_writing(self) -> None:
        """Look again after `write_timeout_s`; if nothing has been read by then, cut the line."""
        if not self.write_timeout_s:
            return
        self._stop_write_timer()
        num_bytes = _num_unread_bytes(self.transport)
        self._write_timer = self.loop.call_later(
            self.write_timeout_s, self._check_writing, num_bytes
        )

    def _check_writing(self, num_bytes_before: int) -> None:
        if _num_unread_bytes(self.transport) < num_bytes_before:
            self._watch_writing()
            return
        self._write_timer = None
        logger.info(
            "a client has read nothing for %g s: its connection is cut", self.write_timeout_s
        )
        self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    @property
    def is_idle(self) -> bool:
        """No request is being received or answered, or to be expected at once, and no answer waits
        to be sent.
        """
        if not self._has_begun:
            return self.loop.time() - self._connected_s > _FIRST_REQUEST_S
        is_answered = self.cycle is None or self.cycle.response_complete
        has_sent = self.transport.get_write_buffer_size() == 0
        return is_answered and has_sent and not self._in_head

    def _start_head(self) -> None:
        self._in_head, self._head_began, self._head_bytes = True, True, 0
        self._stop_timer()
        self._head_timer = self.loop.call_later(
            self.read_timeout_s, self.timeout_keep_alive_handler
        )

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: ApiError) -> None:
        """Answer and close, but only after a moment of discarding what still comes in: a reset
        connection would reach the client before the answer does.

        While a former request is being answered, that answer is the last: the client would take
        this one for it.
        """
        self._stop_timer()
        self._refused = True
        if self._owes_an_answer():
            self.cycle.keep_alive = False
            return
        body = msgspec.json.encode(ErrorBody(error.error))
        head = (
            f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"connection: close\r\n{_STANDING.decode()}\r\n"
        )
        self.transport.write(head.encode() + body)
        self.loop.call_later(_LINGER_S, self.transport.close)

    def _owes_an_answer(self) -> bool:
        cycle = self.cycle
        return cycle is not None and not cycle.more_body and not cycle.response_complete


def _num_unread_bytes(transport: asyncio.Transport) -> int:
    """Written and not received by the client: here, and in the kernel, which holds megabytes and
    takes no more before a good part of them has gone.
    """
    in_kernel = array.array("i", [0])
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):  # not on every system
            fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, in_kernel)
    return transport.get_write_buffer_size() + in_kernel[0]
