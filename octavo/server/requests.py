"""Request bodies. None means "the default" everywhere, as in OpenAI's API.

Ranges are checked once, by `SamplingParams`; these structs check types and refuse unknown fields.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # nothing is padded here: accepted, no effect


class SamplingFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What becomes `SamplingParams` under the same name."""

    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None


class GenerateRequest(SamplingFields, kw_only=True):
    """What completions and chat completions share."""

    model: str | None = None
    logit_bias: dict[str, float] | None = None  # keys are token ids
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    timeout: float | None = None  # seconds, from the request's arrival to the end of its answer
    return_token_ids: bool | None = None
    request_id: str | None = None


class CompletionRequest(GenerateRequest, kw_only=True):
    prompt: str | list[Any]  # a text, texts, token ids, or lists of token ids
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = None


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str  # a JSON object


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    function: FunctionCall
    type: str = "function"


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    # Null in every message that a client library gives back.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class Conversation(Protocol):
    """How messages become a prompt: the fields that chat and tokenize requests share (a msgspec
    struct has one base only).
    """

    messages: list[ChatMessage]
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    documents: list[dict[str, str]] | None
    chat_template_kwargs: dict[str, Any] | None


class ChatRequest(GenerateRequest, kw_only=True):
    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, str]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeTextRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, str]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    tokens: list[int]
    model: str | None = None
