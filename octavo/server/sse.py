"""Server-sent events, one write per batch of chunks."""

from __future__ import annotations

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
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], metrics: ServerMetrics, request_id: str
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._metrics = metrics
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            chunk = await anext(events, b"")
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            try:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                async for chunk in events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                last = DONE
            except Exception as exc:
                error = as_api_error(exc, self._request_id)
                self._metrics.http_rejections[error.error.code or "other"] += 1
                last = event(ErrorBody(error.error))
            await send({"type": "http.response.body", "body": last, "more_body": False})
