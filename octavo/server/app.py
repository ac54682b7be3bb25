"""The ASGI applications of the public and the admin port. The tables below are the whole HTTP
surface, and say what each route asks of its caller.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server import admin, probes
from octavo.server.chat import chat_completions
from octavo.server.completions import completions
from octavo.server.gate import Gate, authorize
from octavo.server.keys import Access
from octavo.server.state import ServerState
from octavo.server.tokenize import detokenize, tokenize

Handler = Callable[[ServerState, Request], Awaitable[Response]]


class Endpoint(NamedTuple):
    method: str
    path: str
    access: Access
    handler: Handler
    generates: bool = False  # counts among the streams of its key


_PROBES = (
    Endpoint("GET", "/health", Access.OPEN, probes.health),
    Endpoint("GET", "/livez", Access.OPEN, probes.livez),
    Endpoint("GET", "/readyz", Access.OPEN, probes.readyz),
    Endpoint("GET", "/startupz", Access.OPEN, probes.startupz),
    Endpoint("GET", "/metrics", Access.METRICS, probes.metrics),
)

ROUTES: tuple[Endpoint, ...] = (
    Endpoint("POST", "/v1/chat/completions", Access.INFER, chat_completions, generates=True),
    Endpoint("POST", "/v1/completions", Access.INFER, completions, generates=True),
    Endpoint("GET", "/v1/models", Access.INFER, probes.list_models),
    Endpoint("GET", "/v1/models/{model:path}", Access.INFER, probes.get_model),
    Endpoint("POST", "/tokenize", Access.INFER, tokenize),
    Endpoint("POST", "/detokenize", Access.INFER, detokenize),
    # No probe, and tells an attacker which bugs to try.
    Endpoint("GET", "/version", Access.ANY, probes.version),
    *_PROBES,
)

ADMIN_ROUTES: tuple[Endpoint, ...] = (
    Endpoint("GET", "/admin/config", Access.ADMIN, admin.show_config),
    Endpoint("GET", "/admin/requests", Access.ADMIN, admin.list_requests),
    Endpoint("POST", "/admin/abort/{request_id:path}", Access.ADMIN, admin.abort_request),
    Endpoint("POST", "/admin/drain", Access.ADMIN, admin.drain),
    Endpoint("POST", "/admin/reload-keys", Access.ADMIN, admin.reload_keys),
    *_PROBES,
)


def create_app(state: ServerState, endpoints: tuple[Endpoint, ...] = ROUTES) -> Starlette:
    """The app that serves `endpoints`; `app.state.octavo` is `state`."""
    routes = [
        Route(e.path, _guarded(state, e), methods=[e.method], name=e.handler.__name__)
        for e in endpoints
    ]
    open_paths = frozenset(e.path for e in endpoints if e.access is Access.OPEN)
    middleware = [Middleware(Gate, state=state, open_paths=open_paths)]
    if origins := state.config.origins():
        cors = Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: _pass_on}
    )
    app.router.redirect_slashes = False  # a redirect would be built from the Host header
    app.state.octavo = state
    return app


def _guarded(state: ServerState, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """The handler behind its door: there is no other way to a route."""

    async def answer(http: Request) -> Response:
        authorize(state, http.scope, endpoint.access)
        live = http.state.live_request
        live.route = endpoint.path
        if endpoint.generates:
            key = http.state.key
            own = key.max_streams if key is not None else None
            state.live_requests.enter(live, own or state.config.max_streams_per_key)
        return await endpoint.handler(state, http)

    return answer


async def _pass_on(request: Request, exc: Exception) -> Response:
    """Leave unknown routes and wrong methods to the Gate, which answers every failure."""
    raise exc
