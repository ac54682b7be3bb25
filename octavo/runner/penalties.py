"""State that only some requests need: token counts for penalties, fixed biases, bad words, minimum
lengths.

Kept per row for just those requests, so that the others pay nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.types import EngineRequest

NEG_INF = float("-inf")
_NO_TOKEN = -1  # in a tail: nothing was generated there yet
_ANY_TOKEN = -2  # in a bad word's prefix: padding, matches everything


@dataclass(slots=True)
class TokenCounts:
    """For presence, frequency and repetition penalties."""

    output: torch.Tensor  # [vocab] int32, how often each token was generated
    seen: torch.Tensor  # [vocab] bool, in the prompt or the output


@dataclass(slots=True)
class BadWords:
    """Sequences of two or more tokens whose last token is forbidden after the others."""

    prefixes: torch.Tensor  # [num_words, tail_len] int64, padded with _ANY_TOKEN at the front
    last_ids: torch.Tensor  # [num_words] int64
    tail: torch.Tensor  # [tail_len] int64, the newest generated tokens


@dataclass(slots=True)
class RowConstraints:
    """One request's part in shaping its logits."""

    bias: torch.Tensor | None  # [vocab] float32: logit_bias, allowed_token_ids, one-token bad words
    min_total_len: int  # stop tokens are forbidden before this many tokens, prompt included
    stop_ids: torch.Tensor | None  # [num_stops] int64, set with min_total_len
    counts: TokenCounts | None
    bad_words: BadWords | None

    def restrict(self, logits: torch.Tensor, position: int) -> None:
        """Forbid and bias, in place. logits: [vocab] float32; position: where the new token will
        stand.
        """
        if self.bias is not None:
            logits += self.bias
        if self.bad_words is not None:
            bad = self.bad_words
            hit = ((bad.tail == bad.prefixes) | (bad.prefixes == _ANY_TOKEN)).all(dim=1)
            bans = torch.where(hit, NEG_INF, -NEG_INF)
            logits.scatter_reduce_(0, bad.last_ids, bans.to(logits.dtype), "amin")
        if self.stop_ids is not None and position < self.min_total_len:
            logits[self.stop_ids] = NEG_INF

    def observe(self, token_id: torch.Tensor) -> None:
        """A token was sampled. token_id: [1] int64, on the device; nothing here waits for it."""
        if self.counts is not None:
            self.counts.output.index_add_(0, token_id, torch.ones_like(token_id, dtype=torch.int32))
            self.counts.seen.index_fill_(0, token_id, True)
        if self.bad_words is not None:
            self.bad_words.tail = torch.cat([self.bad_words.tail[1:], token_id])


def make_constraints(
    request: EngineRequest, output_ids: tuple[int, ...], vocab_size: int, device: torch.device
) -> RowConstraints | None:
    """The request's constraints, or None if it has none."""
    params = request.params
    single_bad = [word[0] for word in request.bad_words_token_ids if len(word) == 1]
    min_total_len = len(request.prompt_token_ids) + params.min_tokens
    constraints = RowConstraints(
        bias=_make_bias(request, single_bad, vocab_size, device),
        min_total_len=min_total_len,
        stop_ids=_ids(request.stop_token_ids, device) if params.min_tokens else None,
        counts=_make_counts(request, output_ids, vocab_size, device),
        bad_words=_make_bad_words(request, output_ids, device),
    )
    parts = (constraints.bias, constraints.stop_ids, constraints.counts, constraints.bad_words)
    return constraints if any(part is not None for part in parts) else None


def _ids(token_ids: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
    return torch.tensor(token_ids, dtype=torch.int64, device=device) if token_ids else None


def _make_bias(
    request: EngineRequest, banned: list[int], vocab_size: int, device: torch.device
) -> torch.Tensor | None:
    params = request.params
    if not (params.logit_bias or params.allowed_token_ids or banned):
        return None
    allowed = params.allowed_token_ids
    bias = torch.full((vocab_size,), NEG_INF if allowed else 0.0)
    if allowed:
        bias[list(allowed)] = 0.0
    bias[banned] = NEG_INF
    for token_id, value in (params.logit_bias or {}).items():
        bias[token_id] += value
    return bias.to(device)


def _make_counts(
    request: EngineRequest, output_ids: tuple[int, ...], vocab_size: int, device: torch.device
) -> TokenCounts | None:
    if not request.params.uses_penalties:
        return None
    outputs = torch.tensor(output_ids, dtype=torch.int64)
    counts = torch.bincount(outputs, minlength=vocab_size).to(torch.int32)
    seen = counts > 0
    seen[list(request.prompt_token_ids)] = True
    return TokenCounts(counts.to(device), seen.to(device))


def _make_bad_words(
    request: EngineRequest, output_ids: tuple[int, ...], device: torch.device
) -> BadWords | None:
    words = [word for word in request.bad_words_token_ids if len(word) > 1]
    if not words:
        return None
    tail_len = max(len(word) for word in words) - 1
    prefixes = [[_ANY_TOKEN] * (tail_len - len(word) + 1) + list(word[:-1]) for word in words]
    tail = ([_NO_TOKEN] * tail_len + list(output_ids))[-tail_len:]
    return BadWords(
        prefixes=torch.tensor(prefixes, dtype=torch.int64, device=device),
        last_ids=torch.tensor([word[-1] for word in words], dtype=torch.int64, device=device),
        tail=torch.tensor(tail, dtype=torch.int64, device=device),
    )
