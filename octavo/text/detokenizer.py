"""Tokens to text, as they come.

What is emitted never changes afterwards: half a UTF-8 character is held back until its other bytes
arrive, and shows as U+FFFD only if they do not. Each token costs the same however long the text is,
and the text does not depend on how the tokens were grouped into pushes.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from octavo.text.tokenizer import Tokenizer

_utf8_decoder = codecs.getincrementaldecoder("utf-8")

# A character that is still incomplete after so many tokens never will be complete.
_MAX_HELD_TOKENS = 16
_MAX_CHAR_BYTES = 4


class IncrementalDetokenizer:
    """The text of one output, in the context of its prompt.

    Joined, the pieces equal what the tokenizer decodes for prompt and output together, after the
    prompt's own text. (One exception, to the better: in vocabularies with byte fallback, one bad
    byte does not take the good characters next to it with it.)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._bytes = _utf8_decoder("replace")
        self._window = _Window(tokenizer, spaces_between_special_tokens)
        if tokenizer.is_byte_level:  # the prompt may end within a character
            tail = prompt_token_ids[-_MAX_CHAR_BYTES:]
            self._bytes.decode(b"".join(map(tokenizer.token_bytes, tail)))
            return
        for token_id in reversed(prompt_token_ids):  # the text goes on: no first-word rules
            if token_id not in self._skipped:
                self._window.begin(token_id)
                break

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that the next tokens complete."""
        if not self._skipped.isdisjoint(token_ids):
            token_ids = [token_id for token_id in token_ids if token_id not in self._skipped]
        if self._tokenizer.is_byte_level:
            token_bytes = self._tokenizer.token_bytes
            return self._bytes.decode(b"".join(map(token_bytes, token_ids)))
        return "".join(map(self._push_one, token_ids))

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        return self._window.flush() + self._bytes.decode(b"", final=True)

    def _push_one(self, token_id: int) -> str:
        byte = self._tokenizer.byte_tokens.get(token_id)
        if byte is not None:
            text = self._window.flush() + self._bytes.decode(bytes((byte,)))
            self._window.begin(token_id)
            return text
        return self._bytes.decode(b"", final=True) + self._window.push(token_id)


class _Window:
    """Decodes with the library's own decoder, but only the last few tokens: those whose text is not
    out yet, and the ones before them, for context (a word's leading space depends on it).
    """

    def __init__(self, tokenizer: Tokenizer, spaces_between_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._spaces = spaces_between_special_tokens
        self._context: list[int] = []
        self._context_len = 0  # characters of the context's text
        self._held: list[int] = []

    def begin(self, token_id: int) -> None:
        """Go on after a token whose text came out elsewhere."""
        self._context = [token_id]
        self._context_len = len(self._decode(self._context))
        self._held = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        if text.endswith("\ufffd") and len(self._held) < _MAX_HELD_TOKENS:
            return ""  # perhaps the first bytes of a character
        return self._emit(text)

    def flush(self) -> str:
        return self._emit(self._decode(self._context + self._held)) if self._held else ""

    def _emit(self, text: str) -> str:
        new = text[self._context_len :]
        if new or not self._context:  # a token without text gives no context
            self._context = self._held
            self._context_len = len(self._decode(self._context))
        self._held = []
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids,
            skip_special_tokens=False,  # those to skip never get here
            spaces_between_special_tokens=self._spaces,
        )
