"""`create_app`: the ASGI application. The route table below is the whole HTTP surface."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server import probes
from octavo.server.chat import chat_completions
from octavo.server.completions import completions
from octavo.server.gate import Gate
from octavo.server.state import ServerState
from octavo.server.tokenize import detokenize, tokenize

Handler = Callable[[ServerState, Request], Awaitable[Response]]

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("GET", "/v1/models", probes.list_models),
    ("GET", "/v1/models/{model:path}", probes.get_model),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/version", probes.version),
    ("GET", "/health", probes.health),
    ("GET", "/livez", probes.livez),
    ("GET", "/readyz", probes.readyz),
    ("GET", "/metrics", probes.metrics),
)


def create_app(state: ServerState) -> Starlette:
    """The app that serves `state`; `app.state.octavo` is the same object."""
    routes = [
        Route(path, partial(handler, state), methods=[method], name=handler.__name__)
        for method, path, handler in ROUTES
    ]
    labels: dict[object, str] = {route.endpoint: route.path for route in routes}
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Gate, state=state, route_labels=labels)],
        exception_handlers={HTTPException: _pass_on},
    )
    app.router.redirect_slashes = False  # a redirect would be built from the Host header
    app.state.octavo = state
    return app


async def _pass_on(request: Request, exc: Exception) -> Response:
    """Leave unknown routes and wrong methods to the Gate, which answers every failure."""
    raise exc
