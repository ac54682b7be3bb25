"""What the port answers while the model loads."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.server.errors import ApiError, to_response
from octavo.server.gate import SECURITY_HEADERS
from octavo.server.responses import json_response


class Starting:
    """The app of a server that has no engine yet: alive, not started, and telling how far it is.

    Every URL but /livez gets the same 503, so nothing here needs a key.
    """

    def __init__(self) -> None:
        self.phase = "starting"
        self._began_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/livez":
            response = json_response({"status": "ok"})
        else:
            spent_s = time.monotonic() - self._began_s
            error = ApiError(
                503,
                f"Not ready: {self.phase}, {spent_s:.0f} s so far. Try again later.",
                "not_ready",
                type="service_unavailable",
                headers={"retry-after": "2"},
            )
            response = to_response(error)
        response.raw_headers.extend(SECURITY_HEADERS)
        await response(scope, receive, send)


class Front:
    """Hands each request to `app`, which is one while the server starts and another afterwards."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)
