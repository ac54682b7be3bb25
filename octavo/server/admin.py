"""The admin port's own routes. None shows a prompt, an answer or a secret."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import ConfigError
from octavo.server.errors import ApiError
from octavo.server.live import LiveRequest
from octavo.server.responses import json_response
from octavo.server.state import ServerState


async def show_config(state: ServerState, http: Request) -> Response:
    """Options of the server, and what the engine made of its own."""
    server = {f.name: getattr(state.config, f.name) for f in dataclasses.fields(state.config)}
    for secret in (f.name for f in dataclasses.fields(state.config) if not f.repr):
        if server[secret] is not None:
            server[secret] = "(set)"
    return json_response({"server": server, "engine": msgspec.to_builtins(state.engine.info)})


async def list_requests(state: ServerState, http: Request) -> Response:
    now_s = time.monotonic()
    return json_response({"requests": [_facts(live, now_s) for live in state.live_requests]})


def _facts(live: LiveRequest, now_s: float) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "id": live.request_id,
        "client": live.client,
        "route": live.route,
        "age_s": round(now_s - live.began_s, 3),
    }
    if live.generation is not None:
        choices = live.generation.choices
        facts["num_sequences"] = len(choices)
        facts["num_prompt_tokens"] = sum(len(p.token_ids) for p in live.generation.prompts)
        facts["num_output_tokens"] = sum(choice.num_output_tokens for choice in choices)
    return facts


async def abort_request(state: ServerState, http: Request) -> Response:
    """End the requests with this id; clients choose ids, so there may be several."""
    request_id = http.path_params["request_id"]
    found = [live for live in state.live_requests if live.request_id == request_id]
    generations = [live.generation for live in found if live.generation is not None]
    if not generations:
        raise ApiError(
            404,
            "No live request has this id; GET /admin/requests lists them.",
            "request_not_found",
        )
    for generation in generations:
        generation.abort(
            ApiError(
                500,
                "The server's operator ended this request.",
                "aborted_by_operator",
                type="server_error",
                headers={"x-should-retry": "false"},  # OpenAI's clients would send it again
            )
        )
    return json_response({"aborted": len(generations)})


async def drain(state: ServerState, http: Request) -> Response:
    """What SIGTERM does."""
    state.request_drain()
    return json_response({"status": "draining", "num_requests": len(state.live_requests)})


async def reload_keys(state: ServerState, http: Request) -> Response:
    try:
        state.keys.reload()
    except ConfigError as exc:
        raise ApiError(
            500, f"The keys stay as they were: {exc}", "keys_not_reloaded", type="server_error"
        ) from None
    return json_response({"status": "ok"})
