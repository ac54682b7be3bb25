"""Chat templates: a model's own Jinja, in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from octavo.checkpoint import Checkpoint
from octavo.errors import CheckpointError, InvalidRequestError
from octavo.text.sandbox import Sandbox, metered
from octavo.text.tokenizer import Tokenizer

MAX_TEMPLATE_CHARS = 256 << 10  # the longest on the hub have some 30,000
MAX_OUTPUT_CHARS = 32 << 20


class ChatTemplate:
    """Renders a conversation to the text that the model was trained on.

    `sandbox` keeps templates away from Python's insides and bounds the time and memory they take.
    """

    def __init__(
        self, template: str, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        if len(template) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"The chat template has {len(template)} characters; at most {MAX_TEMPLATE_CHARS} "
                f"are read. Put a shorter chat_template.jinja into the model's folder."
            )
        try:
            self._template = _environment().compile_metered(template)
        except (
            Exception
        ) as error:  # Python's compiler refuses what is nested too deep, in many ways
            raise CheckpointError(f"The chat template is not valid Jinja: {error}") from error

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, bos_token: str | None = None, eos_token: str | None = None
    ) -> ChatTemplate | None:
        """The checkpoint's template, or None where it has none."""
        if checkpoint.chat_template is None:
            return None
        return cls(checkpoint.chat_template, bos_token, eos_token)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text; `kwargs` are the template's own switches.

        Raises:
            InvalidRequestError: a message has content other than text, or the template refuses the
            conversation, in its own words.
        """
        variables = {
            **self._tokens,
            **kwargs,
            "messages": [_plain_message(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": documents,
        }
        pieces, num_chars = [], 0
        try:
            with metered():
                for piece in self._template.generate(variables):
                    pieces.append(piece)
                    num_chars += len(piece)
                    if num_chars > MAX_OUTPUT_CHARS:
                        raise InvalidRequestError(
                            "The chat template's output is too long; send fewer messages.",
                            "messages",
                        )
        except InvalidRequestError:
            raise
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"The model's chat template refuses this conversation: {error}", "messages"
            ) from error
        except Exception as error:  # a template is a program: it can fail in any way
            raise InvalidRequestError(
                f"The model's chat template fails on this conversation: "
                f"{type(error).__name__}: {error}",
                "messages",
            ) from error
        return "".join(pieces)


def need_chat_template(template: ChatTemplate | None) -> ChatTemplate:
    """The template, or an InvalidRequestError that says what to do without one."""
    if template is None:
        raise InvalidRequestError(
            "This model has no chat template: send text to the completions API, or put a "
            "chat_template.jinja into the model's folder.",
            "messages",
        )
    return template


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(message)
    if "content" in plain:
        plain["content"] = _plain_content(plain["content"])
    return plain


def _plain_content(content: Any) -> str | None:
    """Text parts are joined by newlines."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequestError(
            f"content must be a string or a list of parts, not {type(content).__name__}.",
            "messages",
        )
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise InvalidRequestError(
                f"Content parts of type {kind!r} are not supported: this model reads text only.",
                "messages",
            )
        texts.append(text)
    return "\n".join(texts)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what training learns from; here it is as if it
    were not there.
    """

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> Sandbox:
    """The environment that templates on the hub are written for: transformers' filters and
    whitespace rules.
    """
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.add_filter("tojson", _to_json)
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().astimezone().strftime(layout)


def open_text(checkpoint: Checkpoint) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and the chat template of a checkpoint, where it has them. Raises
    CheckpointError.
    """
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    bos = tokenizer.bos_token if tokenizer else None
    eos = tokenizer.eos_token if tokenizer else None
    return tokenizer, ChatTemplate.from_checkpoint(checkpoint, bos, eos)
