"""From a prompt and its sampling parameters to what the engine takes, checked by its limits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from octavo.errors import CapacityError, ContextLengthError, InvalidRequestError
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineInfo, EngineRequest, SamplingParams

MAX_STOP_CHARS = 16_384  # of all stop strings of a request together
MAX_BAD_WORD_CHARS = 16_384  # of all bad words together: each is tokenised twice
_SEED_BITS = 63

_system_random = random.SystemRandom()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine can take."""

    max_model_len: int  # tokens, prompt + output
    vocab_size: int
    kv_capacity_tokens: int  # of the whole KV cache
    eos_token_ids: tuple[int, ...]
    block_size: int  # tokens

    @classmethod
    def from_info(cls, info: EngineInfo) -> Limits:
        return cls(
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            kv_capacity_tokens=info.kv_capacity_tokens,
            eos_token_ids=info.eos_token_ids,
            block_size=info.block_size,
        )

    @property
    def max_total_len(self) -> int:
        """The longest sequence that the KV cache holds: its last token needs no entry."""
        return self.kv_capacity_tokens // self.block_size * self.block_size + 1


def check_request(prompt_token_ids: Sequence[int], params: SamplingParams, limits: Limits) -> int:
    """The length, prompt and output, at which the request ends.

    Raises:
        InvalidRequestError: an empty prompt, or a token id beyond the vocabulary.
        ContextLengthError: prompt and output do not fit the model's context.
        CapacityError: they could never fit the KV cache.
    """
    _check_ids(prompt_token_ids, params, limits.vocab_size)
    prompt_len = len(prompt_token_ids)
    if prompt_len >= limits.max_model_len:
        raise ContextLengthError(
            f"The prompt has {prompt_len} tokens, but the model's context is "
            f"{limits.max_model_len} tokens, prompt and output together. Shorten the prompt.",
            "prompt",
        )
    if params.max_tokens is None:
        total_len = min(limits.max_model_len, max(limits.max_total_len, prompt_len + 1))
    else:
        total_len = prompt_len + params.max_tokens
        if total_len > limits.max_model_len:
            raise ContextLengthError(
                f"The prompt has {prompt_len} tokens and max_tokens is {params.max_tokens}, but "
                f"the model's context is {limits.max_model_len} tokens, prompt and output "
                f"together. Shorten the prompt or lower max_tokens.",
                "max_tokens",
            )
    num_blocks = -(-(total_len - 1) // limits.block_size)
    if num_blocks * limits.block_size > limits.kv_capacity_tokens:
        raise CapacityError(
            f"The request needs {total_len - 1} tokens of KV cache, more than all there is "
            f"({limits.kv_capacity_tokens}). Shorten the prompt, lower max_tokens, or start the "
            f"engine with more memory for the cache.",
            "max_tokens" if params.max_tokens else "prompt",
        )
    return total_len


def prepare_requests(
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    limits: Limits,
    tokenizer: Tokenizer | None,
    *,
    next_id: Callable[[], int],
    default_seed: int | None = None,
    priority: int = 0,
    cache_salt: str = "",
    client: str = "",
    arrival_s: float,
    deadline_s: float | None = None,
) -> list[EngineRequest]:
    """One engine request for each of the `n` outputs, in order.

    Output `i` has seed `seed + i`, where there is a seed; the others get one from the system.

    Raises:
        InvalidRequestError: see `check_request`; or strings need a tokenizer and there is none.
    """
    max_total_len = check_request(prompt_token_ids, params, limits)
    _check_strings(params, tokenizer)
    stop_token_ids = _unique(
        (*(() if params.ignore_eos else limits.eos_token_ids), *(params.stop_token_ids or ()))
    )
    bad_words = _bad_words_token_ids(params.bad_words or (), tokenizer)
    seed = params.seed if params.seed is not None else default_seed
    prompt = tuple(prompt_token_ids)
    return [
        EngineRequest(
            request_id=next_id(),
            prompt_token_ids=prompt,
            params=params,
            max_total_len=max_total_len,
            stop_token_ids=stop_token_ids,
            bad_words_token_ids=bad_words,
            seed=_system_random.getrandbits(_SEED_BITS) if seed is None else _wrap(seed + child),
            priority=priority,
            cache_salt=cache_salt,
            client=client,
            arrival_s=arrival_s,
            deadline_s=deadline_s,
        )
        for child in range(params.n)
    ]


def _check_ids(prompt_token_ids: Sequence[int], params: SamplingParams, vocab_size: int) -> None:
    if not prompt_token_ids:
        raise InvalidRequestError("The prompt is empty; send at least one token.", "prompt")
    _check_vocabulary("prompt", prompt_token_ids, vocab_size)
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        _check_vocabulary(name, getattr(params, name) or (), vocab_size)


def _check_vocabulary(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    token_ids = list(token_ids)
    if not token_ids:
        return
    if set(map(type, token_ids)) != {int}:
        raise InvalidRequestError(f"{name} must hold token ids (integers).", name)
    for extreme in (min(token_ids), max(token_ids)):
        if not 0 <= extreme < vocab_size:
            raise InvalidRequestError(
                f"{name} holds token id {extreme}, but the vocabulary has ids 0 to "
                f"{vocab_size - 1}.",
                name,
            )


def _check_strings(params: SamplingParams, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        for name in ("stop", "bad_words"):
            if getattr(params, name):
                raise InvalidRequestError(
                    f"{name} needs a tokenizer, and this model has none; use token ids.", name
                )
    if sum(map(len, params.stop_strings)) > MAX_STOP_CHARS:
        raise InvalidRequestError(
            f"The stop strings have more than {MAX_STOP_CHARS} characters together.", "stop"
        )
    if sum(map(len, params.bad_words or ())) > MAX_BAD_WORD_CHARS:
        raise InvalidRequestError(
            f"The bad words have more than {MAX_BAD_WORD_CHARS} characters together.", "bad_words"
        )


def _bad_words_token_ids(
    words: Sequence[str], tokenizer: Tokenizer | None
) -> tuple[tuple[int, ...], ...]:
    """The token sequences to avoid: each word as it begins a text, and as it follows a space."""
    if tokenizer is None:
        return ()
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if not token_ids or not text.strip():
                raise InvalidRequestError(f"bad_words holds {word!r}, a blank word.", "bad_words")
            found[token_ids] = None
    return tuple(found)


def _unique(token_ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token_ids))


def _wrap(seed: int) -> int:
    """Into [0, 2**63), where the engine's random states live."""
    return seed & ((1 << _SEED_BITS) - 1)
