"""What the client sent → token ids."""

from __future__ import annotations

from typing import Any

from octavo.errors import InvalidRequestError
from octavo.server.conversation import check_conversation, render
from octavo.server.generation import Prompt
from octavo.server.requests import Conversation
from octavo.server.state import ServerState
from octavo.text.chat_template import need_chat_template


async def completion_prompts(
    state: ServerState, prompt: str | list[Any], add_special_tokens: bool
) -> list[Prompt]:
    """One `Prompt` for each that the `prompt` field holds."""
    items = _split(prompt)
    if len(items) > state.config.max_prompts:
        raise InvalidRequestError(
            f"prompt holds {len(items)} prompts; at most {state.config.max_prompts} are allowed "
            "in one request.",
            "prompt",
        )
    texts = [item for item in items if isinstance(item, str)]
    if not texts:
        return [Prompt(item) for item in items if isinstance(item, list)]
    tokenizer = state.need_tokenizer()

    def encode_all() -> list[Prompt]:
        encoded = tokenizer.encode_batch(texts, add_special_tokens)
        return [Prompt(ids, text) for ids, text in zip(encoded, texts, strict=True)]

    return await state.offload(sum(map(len, texts)), encode_all)


def _split(prompt: str | list[Any]) -> list[str] | list[list[int]]:
    if isinstance(prompt, str):
        prompt = [prompt]
    if not prompt:
        raise InvalidRequestError(
            "prompt is empty; send a text, token ids, or a list of them.", "prompt"
        )
    kinds = set(map(type, prompt))
    if kinds == {str}:
        return prompt
    if kinds == {int}:
        return [prompt]
    if kinds == {list}:
        for i, item in enumerate(prompt):
            if not item or set(map(type, item)) != {int}:
                raise InvalidRequestError(
                    f"prompt[{i}] must be a non-empty list of token ids.", f"prompt[{i}]"
                )
        return prompt
    raise InvalidRequestError(
        "prompt must be a text, a list of texts, a list of token ids, or a list of such lists; "
        "the kinds cannot be mixed.",
        "prompt",
        "invalid_type",
    )


async def chat_prompt(
    state: ServerState, request: Conversation, add_special_tokens: bool, num_bytes: int
) -> Prompt:
    """The conversation through the model's chat template, as tokens. `num_bytes` is the size of
    the request's body, which bounds the work.
    """
    template = need_chat_template(state.chat_template)
    tokenizer = state.need_tokenizer()
    messages = check_conversation(request, state.config.max_messages)

    def render_and_encode() -> Prompt:
        return Prompt(tokenizer.encode(render(template, messages, request), add_special_tokens))

    return await state.offload(num_bytes, render_and_encode)
