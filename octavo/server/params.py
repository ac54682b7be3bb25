"""Request fields → `SamplingParams`, and the checks that need no tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from octavo.errors import InvalidRequestError
from octavo.server.requests import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    SamplingFields,
)
from octavo.types import SamplingParams

MAX_CACHE_SALT = 256
MAX_PRIORITY = 1000  # waiting makes up for priority: nobody shall have to wait for years
_REQUEST_ID = re.compile(r"[!-~]{1,128}")  # printable ASCII, no spaces


def valid_request_id(text: str) -> bool:
    return _REQUEST_ID.fullmatch(text) is not None


def check_common(request: GenerateRequest) -> None:
    """Fields of every generating request that `SamplingParams` does not know."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError(
            "stream_options needs stream=true; set it or remove stream_options.", "stream_options"
        )
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequestError(
            "prompt_logprobs is not available with stream=true; send stream=false.",
            "prompt_logprobs",
        )
    if request.request_id is not None and not valid_request_id(request.request_id):
        raise InvalidRequestError(
            "request_id must be 1 to 128 printable ASCII characters without spaces.", "request_id"
        )
    if request.cache_salt is not None and not 1 <= len(request.cache_salt) <= MAX_CACHE_SALT:
        raise InvalidRequestError(
            f"cache_salt must be 1 to {MAX_CACHE_SALT} characters long; or remove it.",
            "cache_salt",
        )
    if request.priority is not None and abs(request.priority) > MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority must be from -{MAX_PRIORITY} to {MAX_PRIORITY}; lower is served earlier.",
            "priority",
        )
    keep = request.truncate_prompt_tokens
    if keep is not None and not (keep == -1 or 1 <= keep < 2**31):
        raise InvalidRequestError(
            "truncate_prompt_tokens must be the number of last tokens to keep, "
            "or -1 for as many as fit.",
            "truncate_prompt_tokens",
        )


def completion_params(
    request: CompletionRequest, defaults: Mapping[str, Any]
) -> tuple[SamplingParams, bool]:
    """The parameters, and whether only the prompt is wanted: `echo` with `max_tokens` 0 asks for
    its log-probabilities, as evaluation harnesses do.
    """
    only_prompt = bool(request.echo) and request.max_tokens == 0
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, request.logprobs)
    params = _sampling_params(
        request,
        defaults,
        max_tokens=1 if only_prompt else request.max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return params, only_prompt


def chat_params(request: ChatRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequestError(
            "top_logprobs needs logprobs=true; set it or remove top_logprobs.", "top_logprobs"
        )
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequestError(
            f"max_tokens ({old}) and max_completion_tokens ({new}) differ; send one of them.",
            "max_tokens",
        )
    if new is not None and not 1 <= new < 2**31:
        raise InvalidRequestError(
            f"max_completion_tokens must be at least 1, got {new}.", "max_completion_tokens"
        )
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= 20:
        raise InvalidRequestError(
            f"top_logprobs must be between 0 and 20, got {request.top_logprobs}.", "top_logprobs"
        )
    return _sampling_params(
        request,
        defaults,
        max_tokens=old if new is None else new,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
    )


def _sampling_params(
    request: GenerateRequest,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    fields = dict(defaults)
    for name in SamplingFields.__struct_fields__:
        if (value := getattr(request, name)) is not None:
            fields[name] = value
    fields |= {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    return SamplingParams(logit_bias=_logit_bias(request.logit_bias), **fields)


def _logit_bias(biases: dict[str, float] | None) -> dict[int, float] | None:
    if not biases:
        return None
    result: dict[int, float] = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequestError(
                f"logit_bias keys must be token ids as decimal strings, got {key[:40]!r}.",
                "logit_bias",
            )
        result[int(key)] = bias
    if len(result) != len(biases):
        raise InvalidRequestError("logit_bias names a token id twice.", "logit_bias")
    return result
