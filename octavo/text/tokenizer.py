"""Text to tokens and back: the `tokenizers` library behind the few calls that Octavo makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import tokenizers

from octavo.checkpoint import Checkpoint
from octavo.errors import CheckpointError, InvalidRequestError

_CACHED_TOKENS = 1 << 16


class Tokenizer:
    """A model's tokenizer. Safe to share between threads.

    Attributes:
        vocab_size: number of ids, added tokens included; the model's own vocabulary may be padded
            beyond it.
        bos_token, eos_token: their texts; `bos_token_id`, `eos_token_id`: their ids. None where
            the model has none.
        special_token_ids: tokens that `skip_special_tokens` leaves out.
        byte_tokens: value of each token that stands for one byte (`<0x0A>`), by id; empty in
            vocabularies without byte fallback.
        token_bytes, token_text: what one token adds to a running text, by id; see `_token_bytes`
            and `_token_text`, which they remember.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
    ) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
            layout = json.loads(tokenizer_json)
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(f"tokenizer.json cannot be used: {error}") from error
        except BaseException as error:
            _refuse_panic(error)
            raise
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(True).values(), default=-1) + 1
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.bos_token_id = self._id_of(bos_token)
        self.eos_token_id = self._id_of(eos_token)
        # tokenizer.json's own template goes first; the flags are for files without one.
        plain = layout.get("post_processor") is None or not self._adds_special_tokens()
        self._prefix = (
            [self.bos_token_id] if plain and add_bos and self.bos_token_id is not None else []
        )
        self._suffix = (
            [self.eos_token_id] if plain and add_eos and self.eos_token_id is not None else []
        )
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self._decoder_kinds = _kinds(layout.get("decoder"))
        self.byte_tokens = self._byte_tokens() if "ByteFallback" in self._decoder_kinds else {}
        self.token_bytes = lru_cache(maxsize=_CACHED_TOKENS)(self._token_bytes)
        self.token_text = lru_cache(maxsize=_CACHED_TOKENS)(self._token_text)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer | None:
        """The checkpoint's tokenizer, or None where it has none.

        Raises:
            CheckpointError: tokenizer.json is broken.
        """
        if checkpoint.tokenizer_json is None:
            return None
        config = checkpoint.tokenizer_config
        try:
            return cls(
                checkpoint.tokenizer_json,
                bos_token=_token_string(config.get("bos_token")),
                eos_token=_token_string(config.get("eos_token")),
                add_bos=config.get("add_bos_token"),
                add_eos=config.get("add_eos_token"),
            )
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error

    @property
    def is_byte_level(self) -> bool:
        """Whether a text is the UTF-8 of its tokens' bytes, put one after the other."""
        return self._decoder_kinds == ("ByteLevel",)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with `add_special_tokens`, inside what the model expects around it
        (BOS, mostly).

        Raises:
            InvalidRequestError: the text holds lone surrogates, which no UTF-8 can carry.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of each text, on several cores where there are many."""
        try:
            if len(texts) == 1:
                found = [self._tokenizer.encode(texts[0], add_special_tokens=add_special_tokens)]
            else:
                found = self._tokenizer.encode_batch_fast(
                    list(texts), add_special_tokens=add_special_tokens
                )
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequestError(
                "The text cannot be encoded: it must be a string without lone surrogates."
            ) from error
        except BaseException as error:
            _refuse_panic(error)
            raise
        ids = [encoding.ids for encoding in found]
        if add_special_tokens and (self._prefix or self._suffix):
            return [self._wrapped(one) for one in ids]
        return ids

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of token ids; ids beyond the vocabulary have none.

        `spaces_between_special_tokens` is taken for compatibility: tokenizer.json decoders put no
        spaces there, as in transformers' fast tokenizers.
        """
        try:
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            _refuse_panic(error)
            raise

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a running text; b"" beyond the vocabulary."""
        if token_id in self.byte_tokens:
            return bytes([self.byte_tokens[token_id]])
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if not self.is_byte_level:
            return self.token_text(token_id).encode()
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        except KeyError:  # an added token, stored as its text
            return token.encode()

    def _token_text(self, token_id: int) -> str:
        """A token as it shows inside a text: with the space it may begin with; incomplete
        characters as U+FFFD. Special tokens show as they are written.
        """
        if self.is_byte_level or token_id in self.byte_tokens:
            return self.token_bytes(token_id).decode("utf-8", "replace")
        alone = self.decode([token_id], skip_special_tokens=False)
        twice = self.decode([token_id, token_id], skip_special_tokens=False)
        return twice[len(alone) :]

    def _wrapped(self, ids: list[int]) -> list[int]:
        has_bos = self._prefix and ids[:1] == self._prefix  # a chat template may have written it
        return [*([] if has_bos else self._prefix), *ids, *self._suffix]

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def _adds_special_tokens(self) -> bool:
        return self._tokenizer.num_special_tokens_to_add(False) > 0

    def _byte_tokens(self) -> dict[int, int]:
        found = {}
        for value in range(256):
            token_id = self._tokenizer.token_to_id(f"<0x{value:02X}>")
            if token_id is not None:
                found[token_id] = value
        return found


def _refuse_panic(error: BaseException) -> None:
    """A tokenizer.json that contradicts itself makes the library panic, sometimes only in use.
    Rust's panics are no Exceptions, and nobody expects them.
    """
    if type(error).__name__ == "PanicException":
        raise CheckpointError(f"tokenizer.json cannot be used: {error}") from error


def _kinds(decoder: dict[str, Any] | None) -> tuple[str, ...]:
    """The steps of a tokenizer.json's decoder."""
    if decoder is None:
        return ()
    if decoder.get("type") == "Sequence":
        return tuple(kind for step in decoder.get("decoders", ()) for kind in _kinds(step))
    return (str(decoder.get("type")),)


def _token_string(value: Any) -> str | None:
    """tokenizer_config.json has a token as a string or as {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the rest for U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
