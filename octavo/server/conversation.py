"""Chat messages: checked, made plain, and rendered by the model's template."""

from __future__ import annotations

from typing import Any

from octavo.errors import InvalidRequestError
from octavo.server.decode import parse_object
from octavo.server.requests import ChatMessage, Conversation
from octavo.text.chat_template import ChatTemplate

ROLES = ("system", "developer", "user", "assistant", "tool")
_MEDIA_PARTS = (
    "image_url",
    "input_image",
    "image",
    "input_audio",
    "audio_url",
    "video_url",
    "file",
)

# Names that the template gets from us; a request must not be able to replace them.
RESERVED_KWARGS = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("bos_token", "eos_token", "chat_template", "template", "tokenize", "return_dict"),
        *("strftime_now", "raise_exception", "self"),
    )
)


def check_conversation(request: Conversation, max_messages: int) -> list[dict[str, Any]]:
    """The messages as the template gets them: plain dicts with text content.

    Raises:
        InvalidRequestError: names the message and field at fault.
    """
    if not request.messages:
        raise InvalidRequestError("messages is empty; send at least one message.", "messages")
    if len(request.messages) > max_messages:
        raise InvalidRequestError(
            f"messages holds {len(request.messages)} messages; at most {max_messages} are allowed.",
            "messages",
        )
    if request.continue_final_message:
        if request.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other; send one.",
                "continue_final_message",
            )
        last = request.messages[-1]
        if last.role != "assistant" or not last.content:
            raise InvalidRequestError(
                "continue_final_message needs a last message of role assistant with content.",
                "continue_final_message",
            )
    for name in request.chat_template_kwargs or ():
        if name in RESERVED_KWARGS or not name.isidentifier() or name.startswith("_"):
            raise InvalidRequestError(
                f"chat_template_kwargs must not set {name[:100]!r}; it takes the template's own "
                "switches, such as enable_thinking.",
                "chat_template_kwargs",
            )
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(request.messages)]


def render(template: ChatTemplate, messages: list[dict[str, Any]], request: Conversation) -> str:
    """The prompt text. With `continue_final_message` it ends where the last message's text does."""
    resume = bool(request.continue_final_message)
    begin_answer = request.add_generation_prompt
    if begin_answer is None:
        begin_answer = not resume
    text = template.render(
        messages,
        add_generation_prompt=begin_answer,
        documents=request.documents,
        **(request.chat_template_kwargs or {}),
    )
    if not resume:
        return text
    final = messages[-1]["content"].strip()
    end = text.rfind(final)
    if end < 0:
        raise InvalidRequestError(
            "The model's chat template changes the last message, so it cannot be continued.",
            "continue_final_message",
        )
    return text[: end + len(final)]


def _plain(message: ChatMessage, where: str) -> dict[str, Any]:
    if message.role not in ROLES:
        shown = message.role[:40]
        raise InvalidRequestError(
            f"{where}.role must be one of {', '.join(ROLES)}, not {shown!r}.", f"{where}.role"
        )
    content = _text(message.content, f"{where}.content")
    if content is None and not (message.role == "assistant" and message.tool_calls):
        raise InvalidRequestError(
            f"{where}.content is required: a text or a list of text parts.", f"{where}.content"
        )
    # "developer" is OpenAI's newer name for "system", which is what templates know.
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": content}
    if message.tool_calls:
        if message.role != "assistant":
            raise InvalidRequestError(
                f"{where}.tool_calls belongs to role assistant.", f"{where}.tool_calls"
            )
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, where),
                },
            }
            for call in message.tool_calls
        ]
    if message.role == "tool" and message.tool_call_id is None:
        raise InvalidRequestError(
            f"{where}.tool_call_id is required with role tool.", f"{where}.tool_call_id"
        )
    reasoning = message.reasoning_content or message.reasoning
    extras = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": reasoning,
    }
    return plain | {name: value for name, value in extras.items() if value is not None}


def _text(content: str | list[dict[str, Any]] | None, where: str) -> str | None:
    """Text parts are joined by newlines."""
    if content is None or isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        kind, text = part.get("type"), part.get("text")
        if kind in _MEDIA_PARTS:
            raise InvalidRequestError(
                f"{where}[{i}]: {kind} parts are not supported, this model reads text only.",
                f"{where}[{i}].type",
                "unsupported_content",
            )
        if kind != "text" or not isinstance(text, str) or len(part) != 2:
            raise InvalidRequestError(
                f'{where}[{i}] must be {{"type": "text", "text": "..."}}.', f"{where}[{i}]"
            )
        texts.append(text)
    if not texts:
        raise InvalidRequestError(f"{where} holds no parts; send a text.", where)
    return "\n".join(texts)


def _arguments(text: str, where: str) -> dict[str, Any]:
    """Templates expect the arguments as an object; the API carries them as JSON text."""
    try:
        return parse_object(text.encode() or b"{}")
    except InvalidRequestError as exc:
        raise InvalidRequestError(
            f"{where}.tool_calls: function.arguments must be the text of a JSON object. {exc}",
            f"{where}.tool_calls",
        ) from None
