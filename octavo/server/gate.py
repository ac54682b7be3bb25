"""The outermost layer: request id, API key, header size, request counts, and the one place where
an exception becomes a response. Plain ASGI, so that streams pass through untouched.

Nothing behind it is reached without a key, where there are keys, except the probes: not even the
answer that a route does not exist. What a key may do is checked at the route (`authorize`).
"""

from __future__ import annotations

import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.log import get_logger
from octavo.server.connection import ClientDisconnectedError
from octavo.server.errors import ApiError, as_api_error, to_response
from octavo.server.keys import Access, Key
from octavo.server.live import LiveRequest
from octavo.server.params import valid_request_id
from octavo.server.state import ServerState
from octavo.server.tracing import NO_TRACE

CLIENT_CLOSED = 499  # nginx's status for a client that went away before the answer

# On every answer: it is for its asker alone, and it is what its content type says.
SECURITY_HEADERS = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]

logger = get_logger(__name__)


class Gate:
    """Puts into `scope["state"]`: `request_id`; `client`, the name of the key, "" without; `key`;
    `live_request`.
    """

    def __init__(self, app: ASGIApp, state: ServerState, open_paths: frozenset[str]) -> None:
        self._app = app
        self._state = state
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if valid_request_id(given) else uuid.uuid4().hex
        live = LiveRequest(request_id)
        facts = scope.setdefault("state", {})
        facts |= {"request_id": request_id, "client": "", "key": None, "live_request": live}
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    *SECURITY_HEADERS,
                ]
                if self._state.draining:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        trace = NO_TRACE
        try:
            self._admit(scope, headers)
            trace = self._state.tracing.begin(scope)
            await self._app(scope, receive, trace.watch_send(send_with_headers))
        except ClientDisconnectedError:
            status = CLIENT_CLOSED
        except Exception as exc:
            error = as_api_error(exc, request_id)
            if status:  # too late for another answer: the connection is cut
                raise
            await self.refuse(error, scope, receive, send_with_headers)
        finally:
            self._state.live_requests.leave(live)
            self._count(scope, live.route or "other", status, time.monotonic() - began_s)
            trace.end(live.route or "other", status or CLIENT_CLOSED)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        num_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
        num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
        if num_bytes > self._state.config.max_header_bytes:
            raise header_too_large(self._state.config.max_header_bytes)
        is_open = scope["path"] in self._open_paths
        if scope["state"].get("is_surplus") and not is_open:
            raise _too_many_connections()
        if self._state.keys.required:
            key = self._identify(headers)
            if key is not None and not key.is_expired:
                scope["state"] |= {"key": key, "client": key.name}
                scope["state"]["live_request"].client = key.name
            elif not is_open:
                raise _invalid_key(key)
        elif scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            self._check_origin(headers.get("origin"))

    def _identify(self, headers: Headers) -> Key | None:
        self._state.keys.refresh()
        given = headers.getlist("authorization")
        if len(given) != 1:  # of two, a proxy may have checked the other one
            return None
        scheme, _, token = given[0].partition(" ")
        is_bearer = scheme.lower() == "bearer"
        return self._state.keys.find(token.encode("latin-1")) if is_bearer else None

    def _check_origin(self, origin: str | None) -> None:
        """Without keys, any page that the user's browser shows could make requests to localhost."""
        if origin is not None and origin not in self._state.config.origins():
            raise ApiError(
                403,
                f"Pages of {origin[:200]!r} may not call this server; the operator can name them "
                "with --allowed-origins.",
                "origin_not_allowed",
            )

    async def refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        self._state.metrics.http_rejections[error.error.code or "invalid_request"] += 1
        await to_response(error)(scope, receive, send)

    def _count(self, scope: Scope, route: str, status: int, duration_s: float) -> None:
        self._state.metrics.http_requests[route, status or CLIENT_CLOSED] += 1
        if self._state.config.access_log:
            path = (scope.get("raw_path") or b"").decode("ascii", "replace")
            client = scope["state"]["client"]
            fields = {
                "method": scope["method"],
                "route": route,
                "status": status,
                "duration_s": round(duration_s, 6),
                "client": client,
                "request_id": scope["state"]["request_id"],
            }
            line = (client or "-", scope["method"], path, status)
            logger.info("%s %s %s %d", *line, extra=fields)


def authorize(state: ServerState, scope: Scope, access: Access) -> None:
    """ApiError 401 or 403 unless the caller may use a route with this access.

    Without keys the admin port takes connections of this machine only (`ServerConfig`).
    """
    if access is Access.OPEN or not state.keys.required:
        return
    key: Key | None = scope["state"]["key"]
    if key is None:
        raise _invalid_key(None)
    if access is not Access.ANY and access not in key.scopes:
        raise ApiError(
            403,
            f"The key {key.name!r} does not have the scope {access.value!r} that this URL needs.",
            "insufficient_scope",
            type="permission_error",
        )


def _invalid_key(key: Key | None) -> ApiError:
    what = "A valid API key is required" if key is None else "This API key has expired"
    return ApiError(
        401,
        f"{what}: send the header 'Authorization: Bearer KEY'.",
        "invalid_api_key" if key is None else "expired_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def _too_many_connections() -> ApiError:
    return ApiError(
        503,
        "The server has as many connections as it takes; try again later.",
        "too_many_connections",
        type="service_unavailable",
        headers={"retry-after": "1", "connection": "close"},
    )


def header_too_large(max_bytes: int) -> ApiError:
    return ApiError(
        431,
        f"The request line and headers are larger than {max_bytes} bytes; send less.",
        "headers_too_large",
        headers={"connection": "close"},
    )
