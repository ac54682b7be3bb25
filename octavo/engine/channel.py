"""The server's end of the socket to an engine process, on the event loop.

Not asyncio's streams: when one of their writes finds that the peer is gone, they throw away what
has been read, and the engine's last words with it.
"""

from __future__ import annotations

import asyncio
import socket

from octavo.engine.messages import (
    HEADER_BYTES,
    ToEngine,
    ToServer,
    encode_frame,
    frame_length,
    to_server_decoder,
)

_READ_BYTES = 1 << 18


class Channel:
    """Messages in both directions. The socket is its owner's to close, after `close`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.is_open = True
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._incoming = bytearray()
        self._outgoing = bytearray()  # what the socket would not take at once

    async def next(self) -> ToServer | None:
        """The next message, or None when the process is gone."""
        header = await self._take(HEADER_BYTES)
        payload = None if header is None else await self._take(frame_length(header))
        if payload is None:
            return None
        message: ToServer = to_server_decoder.decode(payload)
        return message

    async def _take(self, num_bytes: int) -> bytes | None:
        while len(self._incoming) < num_bytes:
            try:
                data = await self._loop.sock_recv(self._sock, _READ_BYTES)
            except ConnectionError:
                return None
            if not data:
                return None
            self._incoming += data
        taken = bytes(self._incoming[:num_bytes])
        del self._incoming[:num_bytes]
        return taken

    def send(self, message: ToEngine) -> None:
        """Never blocks; what is said to a process that has ended is lost."""
        if not self.is_open:
            return
        if not self._outgoing:
            self._loop.add_writer(self._sock, self._flush)
        self._outgoing += encode_frame(message)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self._sock.send(self._outgoing)]
        except BlockingIOError:
            return
        except OSError:  # the reading end finds out why
            self._outgoing.clear()
        self._loop.remove_writer(self._sock)

    def close(self) -> None:
        """Say and hear nothing more. Nothing may be waiting in `next`."""
        if self.is_open:
            self.is_open = False
            self._loop.remove_writer(self._sock)
