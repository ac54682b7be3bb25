"""Fields of OpenAI's and vLLM's APIs that are known here but not served, as data.

IGNORED fields change nothing that a client could observe. UNSUPPORTED ones are accepted with a
value that asks for nothing, because client libraries send those, and refused with any other.
"""

from __future__ import annotations

from typing import Any

_NULL = type(None)

IGNORED: dict[str, tuple[type, ...]] = {
    "user": (str, _NULL),
    "metadata": (dict, _NULL),
    "safety_identifier": (str, _NULL),
    "prompt_cache_key": (str, _NULL),
    "prompt_cache_retention": (str, _NULL),
    "session_id": (str, _NULL),
}

_TOOLS = "tool calling is not available; send no tools."
_GRAMMAR = "structured output is not available; describe the format in the prompt."
_BEAM = "beam search is not available; use n with temperature above 0."
_MEDIA = "this server reads and writes text only."
_TEMPLATE = "requests cannot bring code or templates; the operator sets the template."
_INTERNAL = "it belongs to a deployment feature that this server does not have."
_REASONING = "there is no reasoning parser; remove it."
_REMOVE = "remove it."

UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((None,), _MEDIA),
    "best_of": ((None, 1), "use n."),
    "chat_template": ((None,), _TEMPLATE),
    "custom_logit_processor": ((None,), _TEMPLATE),
    "echo": ((None, False), "chat answers cannot repeat the prompt; use /v1/completions."),
    "early_stopping": ((None, False), _BEAM),
    "ec_transfer_params": ((None,), _INTERNAL),
    "flat_logprobs": ((None, False), _REMOVE),
    "function_call": ((None, "none"), _TOOLS),
    "functions": ((None, []), _TOOLS),
    "guided_choice": ((None,), _GRAMMAR),
    "guided_grammar": ((None,), _GRAMMAR),
    "guided_json": ((None,), _GRAMMAR),
    "guided_regex": ((None,), _GRAMMAR),
    "include_reasoning": ((None, True), _REASONING),
    "kv_transfer_params": ((None,), _INTERNAL),
    "length_penalty": ((None, 1, 1.0), _BEAM),
    "logits_processors": ((None, []), _TEMPLATE),
    "media_io_kwargs": ((None, {}), _MEDIA),
    "mm_processor_kwargs": ((None, {}), _MEDIA),
    "modalities": ((None, ["text"]), _MEDIA),
    "parallel_tool_calls": ((None, True, False), _TOOLS),
    "prediction": ((None,), "predicted outputs are not available; remove it."),
    "prompt_embeds": ((None,), "send text or token ids in prompt."),
    "reasoning_effort": ((None,), _REASONING),
    "regex": ((None,), _GRAMMAR),
    "ebnf": ((None,), _GRAMMAR),
    "repetition_detection": ((None,), _REMOVE),
    "response_format": ((None, {"type": "text"}), _GRAMMAR),
    "return_prompt_text": ((None, False), _REMOVE),
    "return_token_offsets": ((None, False), _REMOVE),
    "return_tokens_as_token_ids": ((None, False), "use return_token_ids."),
    "return_weight_versions": ((None, False), _REMOVE),
    "service_tier": ((None, "auto", "default"), "there is one service tier; send auto."),
    "skip_reading_prefix_cache": ((None, False), "use a fresh cache_salt."),
    "store": ((None, False), "nothing is stored here; send false."),
    "structured_outputs": ((None,), _GRAMMAR),
    "suffix": ((None, ""), "inserting before a suffix is not available; remove it."),
    "thinking_token_budget": ((None,), _REASONING),
    "tool_choice": ((None, "none", "auto"), _TOOLS),
    "tools": ((None, []), _TOOLS),
    "truncation_side": ((None, "left"), "truncation keeps the end of the prompt; send left."),
    "use_beam_search": ((None, False), _BEAM),
    "verbosity": ((None, "medium"), _REMOVE),
    "vllm_xargs": ((None, {}), _INTERNAL),
    "watermarking": ((None,), _REMOVE),
    "web_search_options": ((None,), "web search is not available; remove it."),
}
