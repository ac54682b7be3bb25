"""Server-sent events, one write per batch of chunks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.server.connection import until_disconnect
from octavo.server.errors import ErrorBody, as_api_error
from octavo.server.metrics import ServerMetrics
from octavo.server.responses import encode

DONE = b"data: [DONE]\n\n"
_COMMENT = b": still here\n\n"

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),  # nginx: pass chunks on at once
]


def event(body: msgspec.Struct) -> bytes:
    return b"data: " + encode(body) + b"\n\n"


class EventStream(Response):
    """Sends what `events` yields, then [DONE].

    The headers go out with the first bytes, so that a failure before them is an ordinary error
    response; a later one becomes an error event, which ends the stream. The next item is asked for
    only when the last one is on its way: a slow client slows nobody else and buffers nothing here.

    Where nothing is said for `keep_alive_s` (a long queue, an engine that is being replaced), a
    comment is sent, which clients skip: proxies and clients cut connections that are silent.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        metrics: ServerMetrics,
        request_id: str,
        keep_alive_s: float,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._metrics = metrics
        self._request_id = request_id
        self._keep_alive_s = keep_alive_s  # 0: never
        self._has_begun = False
        self._is_sending = False
        self._sent_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keeper = asyncio.create_task(self._keep_alive(send))
        try:
            await until_disconnect(receive, self._pump(send))
        finally:
            keeper.cancel()

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                async for chunk in events:
                    await self._send(send, chunk)
                last = DONE
            except Exception as exc:
                if not self._has_begun:
                    raise
                error = as_api_error(exc, self._request_id)
                self._metrics.http_rejections[error.error.code or "other"] += 1
                last = event(ErrorBody(error.error))
            await self._send(send, last, more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        self._is_sending = True
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": data, "more_body": more})
        self._sent_s = time.monotonic()
        self._is_sending = not more  # after the end nothing may follow

    async def _keep_alive(self, send: Send) -> None:
        while self._keep_alive_s:
            silent_s = time.monotonic() - self._sent_s
            if silent_s < self._keep_alive_s:
                await asyncio.sleep(self._keep_alive_s - silent_s)
            elif self._is_sending:
                await asyncio.sleep(self._keep_alive_s)
            else:
                await self._send(send, _COMMENT)
