"""Bodies of requests: from bytes to what the engine is sent, and back from there.

The first byte chooses the route. Checked beside what `oracle` says: an accepted request can be
written as a message and is the same when it is read, and all its numbers are within the engine's
limits.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import msgspec
from support.live_server import make_state

from fuzz import oracle
from fuzz.mutators import mutate_json
from octavo.config.server import ServerConfig
from octavo.engine.messages import HEADER_BYTES, Add, encode_frame, to_engine_decoder
from octavo.server import state as server_state
from octavo.server.arrival import Arrival
from octavo.server.decode import decode_body
from octavo.server.errors import ApiError
from octavo.server.generation import Generation
from octavo.server.params import chat_params, check_common, completion_params
from octavo.server.prompts import chat_prompt, completion_prompts
from octavo.server.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from octavo.types import EngineRequest

INSTRUMENTED = ("octavo.server", "octavo.text", "octavo.types")
MAX_LEN = 32 << 10

server_state.OFFLOAD_CHARS = 1 << 40  # everything in this thread: no event loop is needed


async def _make_state() -> server_state.ServerState:
    return make_state(ServerConfig())


_STATE = asyncio.run(_make_state())


def check(data: bytes) -> None:
    kind, body = data[:1], data[1:]
    with oracle.judged(len(data)):
        route = _ROUTES.get(kind, _chat)
        for request in route(body):
            _check_request(request)


def _check_request(request: EngineRequest) -> None:
    frame = encode_frame(Add(request))
    read = to_engine_decoder.decode(frame[HEADER_BYTES:])
    oracle.expect(isinstance(read, Add) and encode_frame(read) == frame, "changed on its way")
    limits = _STATE.limits
    oracle.expect(0 < len(request.prompt_token_ids) < request.max_total_len, "no room to answer")
    oracle.expect(request.max_total_len <= limits.max_model_len, "longer than the context")
    ids = [*request.prompt_token_ids, *request.stop_token_ids, *(request.params.logit_bias or ())]
    ids += [*(request.params.allowed_token_ids or ())]
    oracle.expect(all(0 <= i < limits.vocab_size for i in ids), "an id beyond the vocabulary")
    oracle.expect(0 <= request.seed < 2**63, "a seed out of range")


def _now(coroutine: Any) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise oracle.ViolationError("it waits")


def _chat(body: bytes) -> list[EngineRequest]:
    request = decode_body(body, ChatRequest)
    _STATE.check_model(request.model)
    check_common(request)
    params = chat_params(request, _STATE.generation_defaults)
    prompt = _now(chat_prompt(_STATE, request, bool(request.add_special_tokens), len(body)))
    return _generation([prompt], params, request)


def _completion(body: bytes) -> list[EngineRequest]:
    request = decode_body(body, CompletionRequest)
    _STATE.check_model(request.model)
    check_common(request)
    params, _ = completion_params(request, _STATE.generation_defaults)
    special = request.add_special_tokens is not False
    prompts = _now(completion_prompts(_STATE, request.prompt, special))
    return _generation(prompts, params, request)


def _generation(prompts: Any, params: Any, request: Any) -> list[EngineRequest]:
    arrival = Arrival(time.monotonic(), "", 60.0)
    generation = Generation(_STATE, prompts, params, request, arrival)
    return [choice.request for choice in generation.choices]


def _tokenize(body: bytes) -> list[EngineRequest]:
    request = decode_body(body, TokenizeTextRequest)
    _STATE.need_tokenizer().encode(request.prompt, request.add_special_tokens is not False)
    return []


def _tokenize_chat(body: bytes) -> list[EngineRequest]:
    request = decode_body(body, TokenizeChatRequest)
    _now(chat_prompt(_STATE, request, True, len(body)))
    return []


def _detokenize(body: bytes) -> list[EngineRequest]:
    decode_body(body, DetokenizeRequest)
    return []


_ROUTES = {
    b"c": _chat,
    b"t": _completion,
    b"k": _tokenize,
    b"m": _tokenize_chat,
    b"d": _detokenize,
}


def seeds() -> list[bytes]:
    """Bodies that use every field."""
    sampling: dict[str, Any] = {
        **{"n": 2, "presence_penalty": 0.5, "frequency_penalty": 0.1, "repetition_penalty": 1.1},
        **{
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.01,
            "seed": 7,
            "min_tokens": 1,
        },
        **{"stop": ["x"], "stop_token_ids": [3], "ignore_eos": False, "prompt_logprobs": 2},
        **{"allowed_token_ids": [4, 5], "bad_words": ["bad"], "logit_bias": {"5": 1.0}},
        **{"model": "fake", "max_tokens": 4, "truncate_prompt_tokens": 5, "priority": 0},
        **{"cache_salt": "s", "timeout": 3.0, "return_token_ids": True, "request_id": "r"},
    }
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": [1, {"b": null}]}'}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "hi", "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    chat = {"messages": messages, "chat_template_kwargs": {"enable_thinking": True}}
    bodies: list[tuple[bytes, dict[str, Any]]] = [
        (b"c", sampling | chat | {"logprobs": True, "top_logprobs": 3}),
        (
            b"c",
            {"messages": messages[1:2], "stream": True, "stream_options": {"include_usage": True}},
        ),
        (
            b"c",
            {"messages": messages, "tools": [], "user": "u", "response_format": {"type": "text"}},
        ),
        (b"t", sampling | {"prompt": ["a", "b"], "logprobs": 2, "echo": True}),
        (b"t", {"prompt": [[1, 2], [3]], "max_tokens": None}),
        (b"k", {"prompt": "text", "return_token_strs": True}),
        (b"m", {"messages": messages[:2], "add_generation_prompt": False}),
        (b"d", {"tokens": [1, 2, 3]}),
    ]
    return [kind + json.dumps(body).encode() for kind, body in bodies]


_WORDS = (
    *CompletionRequest.__struct_fields__,
    *ChatRequest.__struct_fields__,
    *("tools", "response_format", "function_call", "best_of", "role", "content", "type", "text"),
    *("user", "assistant", "developer", "image_url", " - at `$.x`", "{% raw %}", "1_0", "\u0661"),
    *("self", "__class__", "loop", "range", "-1", "00005"),
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    return data[:1] + mutate_json(data[1:], rng, _WORDS)


def check_seeds() -> None:
    for data in seeds():
        try:
            _ROUTES[data[:1]](data[1:])
        except (ApiError, msgspec.MsgspecError) as error:
            raise oracle.ViolationError(f"a seed is refused: {error}") from error
