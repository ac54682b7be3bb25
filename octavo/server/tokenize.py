"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import InvalidRequestError
from octavo.server.connection import read_body
from octavo.server.decode import decode_body, parse_object
from octavo.server.prompts import chat_prompt
from octavo.server.requests import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from octavo.server.responses import DetokenizeResponse, TokenizeResponse, json_response
from octavo.server.state import ServerState


async def tokenize(state: ServerState, http: Request) -> Response:
    body = await read_body(http, state.config.max_body_bytes, state.config.read_timeout_s)
    fields = parse_object(body)
    if "prompt" in fields and "messages" in fields:
        raise InvalidRequestError("Send prompt or messages, not both.", "prompt")
    tokenizer = state.need_tokenizer()
    request: TokenizeTextRequest | TokenizeChatRequest
    if "messages" in fields:
        request = decode_body(body, TokenizeChatRequest)
        state.check_model(request.model)
        prompt = await chat_prompt(state, request, bool(request.add_special_tokens), len(body))
        token_ids = prompt.token_ids
    else:
        request = decode_body(body, TokenizeTextRequest)
        state.check_model(request.model)
        token_ids = await state.offload(
            len(request.prompt),
            tokenizer.encode,
            request.prompt,
            request.add_special_tokens is not False,
        )
    strings = None
    if request.return_token_strs:
        strings = [tokenizer.id_to_token(token_id) or "" for token_id in token_ids]
    return json_response(
        TokenizeResponse(len(token_ids), state.engine.info.max_model_len, token_ids, strings)
    )


async def detokenize(state: ServerState, http: Request) -> Response:
    body = await read_body(http, state.config.max_body_bytes, state.config.read_timeout_s)
    request = decode_body(body, DetokenizeRequest)
    state.check_model(request.model)
    tokenizer = state.need_tokenizer()
    vocab_size = tokenizer.vocab_size
    for token_id in request.tokens:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"tokens holds {token_id}; token ids go from 0 to {vocab_size - 1}.", "tokens"
            )
    text = await state.offload(
        len(request.tokens), tokenizer.decode, request.tokens, skip_special_tokens=False
    )
    return json_response(DetokenizeResponse(text))
