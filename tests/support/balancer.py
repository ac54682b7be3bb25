"""A round-robin balancer that keeps connections, and tries another backend only where connecting
failed: what nginx does with POST.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import defaultdict

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Balancer:
    """`num_lost` counts requests whose answer broke off; `num_sent` those by backend port."""

    def __init__(self, ports: list[int]) -> None:
        self.num_lost = 0
        self.num_sent: dict[int, int] = defaultdict(int)
        self._ports = ports
        self._turns = itertools.count()
        self._idle: dict[int, list[Connection]] = defaultdict(list)
        self._clients: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Balancer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        if self._clients:  # which have closed their ends
            await asyncio.wait(self._clients, timeout=10)
        for _, writer in itertools.chain(*self._idle.values()):
            writer.close()
            await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            await self._serve_all(reader, writer)
        finally:
            self._clients.discard(task)
            writer.close()

    async def _serve_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request = head + await reader.readexactly(_content_length(head) or 0)
                try:
                    await self._pass_on(request, writer)
                except (asyncio.IncompleteReadError, ConnectionError):
                    self.num_lost += 1
                    break

    async def _pass_on(self, request: bytes, client: asyncio.StreamWriter) -> None:
        port, (reader, writer) = await self._connect()
        self.num_sent[port] += 1
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        client.write(head)
        length = _content_length(head)
        if length is not None:
            client.write(await reader.readexactly(length))
        else:
            await self._pass_chunks(reader, client)
        await client.drain()
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle[port].append((reader, writer))

    async def _pass_chunks(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter
    ) -> None:
        size = 1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line, 16)
            client.write(line + await reader.readexactly(size + 2))

    async def _connect(self) -> tuple[int, Connection]:
        turn = next(self._turns)
        for offset in range(len(self._ports)):
            port = self._ports[(turn + offset) % len(self._ports)]
            while self._idle[port]:
                reader, writer = self._idle[port].pop()
                if not reader.at_eof():
                    return port, (reader, writer)
                writer.close()
            with contextlib.suppress(ConnectionError):
                return port, await asyncio.open_connection("127.0.0.1", port)
        raise ConnectionRefusedError("no backend is up")


def _content_length(head: bytes) -> int | None:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return None
