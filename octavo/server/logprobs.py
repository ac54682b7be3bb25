"""Log-probabilities in the shapes of OpenAI's two APIs and of vLLM's `prompt_logprobs`.

An `Entry` is what one position knows: the chosen token first, then the most likely ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.server.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprobs,
    TopLogprob,
)
from octavo.text.stream import prompt_logprob_entries
from octavo.text.tokenizer import Tokenizer
from octavo.types import Logprob, TokenLogprobs

Entry = dict[int, Logprob]

LOWEST = -9999.0  # JSON has no -inf; OpenAI's stand-in


def prompt_logprobs_body(
    positions: Sequence[TokenLogprobs], tokenizer: Tokenizer | None
) -> PromptLogprobs:
    """vLLM's shape: by token id as a string; null for the first token."""
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": _finite(item.logprob),
                "rank": item.rank,
                "decoded_token": item.decoded_token,
            }
            for token_id, item in entry.items()
        }
        for entry in prompt_logprob_entries(positions, tokenizer)
    ]


class CompletionLogprobsBuilder:
    """Builds the legacy parallel lists, chunk by chunk; `text_offset` counts from the start of the
    returned text.
    """

    def __init__(self, tokenizer: Tokenizer | None, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def build(
        self, token_ids: Sequence[int], entries: Sequence[Entry | None]
    ) -> CompletionLogprobs:
        body = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, entries, strict=True):
            text = _text(self._tokenizer, token_id)
            body.text_offset.append(self._offset)
            body.tokens.append(text)
            self._offset += len(text)
            if entry is None:
                body.token_logprobs.append(None)
                body.top_logprobs.append(None)
                continue
            chosen = entry[token_id]
            best = dict(_best(entry, self._num_top))
            # The chosen token is always there, so a client may get num_top + 1 entries.
            top = {token_id: chosen} | best
            body.token_logprobs.append(_finite(chosen.logprob))
            body.top_logprobs.append(
                {_text(self._tokenizer, t): _finite(item.logprob) for t, item in top.items()}
            )
        return body


def chat_logprobs(
    token_ids: Sequence[int], entries: Sequence[Entry], num_top: int, tokenizer: Tokenizer | None
) -> ChatLogprobs:
    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        top = [_top_logprob(tokenizer, t, item) for t, item in _best(entry, num_top)]
        chosen = _top_logprob(tokenizer, token_id, entry[token_id])
        content.append(ChatTokenLogprob(chosen.token, chosen.logprob, chosen.bytes, top))
    return ChatLogprobs(content)


def _top_logprob(tokenizer: Tokenizer | None, token_id: int, item: Logprob) -> TopLogprob:
    text = _text(tokenizer, token_id)
    raw = text.encode() if tokenizer is None else tokenizer.token_bytes(token_id)
    return TopLogprob(text, _finite(item.logprob), list(raw))


def _text(tokenizer: Tokenizer | None, token_id: int) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def _best(entry: Entry, count: int) -> list[tuple[int, Logprob]]:
    return sorted(entry.items(), key=lambda pair: -pair[1].logprob)[:count]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
