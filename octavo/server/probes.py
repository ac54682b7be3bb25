"""The routes that ask about the server: models, version, health, metrics.

Health is progress, not a synthetic request: where there is work, steps must be finished.
"""

from __future__ import annotations

from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

import octavo
from octavo.server.errors import ApiError, model_not_found
from octavo.server.responses import Model, ModelList, json_response
from octavo.server.state import ServerState


async def list_models(state: ServerState, http: Request) -> Response:
    return json_response(ModelList([_model(state, name) for name in state.served_model_names]))


async def get_model(state: ServerState, http: Request) -> Response:
    name = http.path_params["model"]
    if name not in state.served_model_names:
        raise model_not_found(name, state.served_model_names)
    return json_response(_model(state, name))


def _model(state: ServerState, name: str) -> Model:
    info = state.engine.info
    return Model(
        id=name, created=state.started_s, root=info.model, max_model_len=info.max_model_len
    )


async def version(state: ServerState, http: Request) -> Response:
    return json_response({"version": octavo.__version__})


async def livez(state: ServerState, http: Request) -> Response:
    """This process answers."""
    return json_response({"status": "ok"})


async def health(state: ServerState, http: Request) -> Response:
    """The engine answers, too."""
    _refuse_if(state.engine.trouble)
    return json_response({"status": "ok"})


async def startupz(state: ServerState, http: Request) -> Response:
    """The engine has started; until then another app answers (`starting.py`)."""
    return json_response({"status": "ok"})


async def readyz(state: ServerState, http: Request) -> Response:
    """New requests are welcome, too."""
    _refuse_if("the server is shutting down" if state.draining else state.engine.trouble)
    return json_response({"status": "ok"})


def _refuse_if(reason: str | None) -> None:
    if reason is not None:
        raise ApiError(503, f"Not ready: {reason}.", "not_ready", type="service_unavailable")


async def metrics(state: ServerState, http: Request) -> Response:
    encode, content_type = choose_encoder(http.headers.get("accept", ""))
    return Response(encode(state.metrics.registry), headers={"content-type": content_type})
