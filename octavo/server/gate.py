"""The outermost layer: request id, API key, header size, request counts, and the one place where
an exception becomes a response. Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import hmac
import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.log import get_logger
from octavo.server.connection import ClientDisconnectedError
from octavo.server.errors import ApiError, as_api_error, to_response
from octavo.server.params import valid_request_id
from octavo.server.state import ServerState
from octavo.server.tracing import NO_TRACE

# Every other route needs the API key, if one is set: probes carry no credentials.
OPEN_ROUTES = frozenset({"/health", "/livez", "/readyz", "/version"})

CLIENT_CLOSED = 499  # nginx's status for a client that went away before the answer

logger = get_logger(__name__)


class Gate:
    def __init__(self, app: ASGIApp, state: ServerState, route_labels: dict[object, str]) -> None:
        """`route_labels` maps an endpoint to its path, for the `route` label of the metrics."""
        self._app = app
        self._state = state
        self._route_labels = route_labels
        key = state.config.api_key
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if valid_request_id(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        trace = NO_TRACE
        try:
            self._admit(scope, headers)
            trace = self._state.tracing.begin(scope)
            await self._app(scope, receive, trace.watch_send(send_with_id))
        except ClientDisconnectedError:
            status = CLIENT_CLOSED
        except Exception as exc:
            error = as_api_error(exc, request_id)
            if status:  # too late for another answer: the connection is cut
                raise
            await self.refuse(error, scope, receive, send_with_id)
        finally:
            self._count(scope, status, time.monotonic() - began_s)
            trace.end(self._label(scope), status or CLIENT_CLOSED)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        num_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
        if num_bytes > self._state.config.max_header_bytes:
            raise header_too_large(self._state.config.max_header_bytes)
        if self._expected is None or scope["path"] in OPEN_ROUTES:
            return
        given = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, self._expected):
            raise ApiError(
                401,
                "A valid API key is required: send the header 'Authorization: Bearer KEY'.",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        self._state.metrics.http_rejections[error.error.code or "invalid_request"] += 1
        await to_response(error)(scope, receive, send)

    def _label(self, scope: Scope) -> str:
        return self._route_labels.get(scope.get("endpoint"), "other")

    def _count(self, scope: Scope, status: int, duration_s: float) -> None:
        label = self._label(scope)
        self._state.metrics.http_requests[label, status or CLIENT_CLOSED] += 1
        if self._state.config.access_log:
            fields = {
                "method": scope["method"],
                "route": label,
                "status": status,
                "duration_s": round(duration_s, 6),
                "client": scope["state"].get("client", ""),
                "request_id": scope["state"]["request_id"],
            }
            logger.info("%s %s %d", scope["method"], scope["path"], status, extra=fields)


def header_too_large(max_bytes: int) -> ApiError:
    return ApiError(
        431,
        f"The request line and headers are larger than {max_bytes} bytes; send less.",
        "headers_too_large",
        headers={"connection": "close"},
    )
