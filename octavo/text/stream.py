"""From an engine's tokens to the output that a user sees, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.text.detokenizer import IncrementalDetokenizer
from octavo.text.stop import StopMatcher
from octavo.text.tokenizer import Tokenizer
from octavo.types import (
    CompletionOutput,
    Finish,
    FinishReason,
    Logprob,
    SamplingParams,
    TokenLogprobs,
)


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What one push added. With `finish_reason` set, it is the last one."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None  # one per token, if asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it


class OutputAssembler:
    """One output of a request: detokenises, looks for stop strings, and keeps the whole.

    Attributes:
        stopped: a stop string ended the output while the engine may still be generating; the
            owner then aborts the engine's request.
    """

    def __init__(
        self, params: SamplingParams, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int]
    ) -> None:
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer = (
            IncrementalDetokenizer(
                tokenizer,
                prompt_token_ids,
                params.skip_special_tokens,
                params.spaces_between_special_tokens,
            )
            if params.detokenize and tokenizer is not None
            else None
        )
        self._matcher = (
            StopMatcher(params.stop_strings, params.include_stop_str_in_output)
            if params.stop_strings
            else None
        )
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = (
            [] if params.logprobs is not None else None
        )
        self._cumulative_logprob = 0.0
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self.stopped = False

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def finished(self) -> bool:
        return self._finish_reason is not None

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        finish: Finish | None = None,
    ) -> OutputDelta:
        """Add the next tokens, and the end if this is it.

        Tokens after a stop string are dropped, and so is everything that comes once the output has
        finished.
        """
        if self.finished:
            return OutputDelta()
        ends_on_token = finish is not None and finish.reason == "stop" and bool(token_ids)
        hidden = int(ends_on_token and not self._params.include_stop_str_in_output)
        text, num_taken = self._detokenize(token_ids, len(token_ids) - hidden)
        if finish is not None and not self.stopped:
            text += self._flush()
            if not self.stopped:
                self._finish_reason, self._stop_reason = finish.reason, finish.stop_token_id
        taken = list(token_ids[:num_taken])
        self._token_ids += taken
        self._texts.append(text)
        return OutputDelta(
            text=text,
            token_ids=taken,
            logprobs=self._keep_logprobs(logprobs[:num_taken]),
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
        )

    def completion(self, index: int = 0) -> CompletionOutput:
        """Everything so far."""
        return CompletionOutput(
            index=index,
            text=self.text,
            token_ids=list(self._token_ids),
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            logprobs=None if self._logprobs is None else list(self._logprobs),
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
        )

    def _detokenize(self, token_ids: Sequence[int], num_shown: int) -> tuple[str, int]:
        """The text of the first `num_shown` tokens, and how many tokens count: all, unless a stop
        string ends the output before.
        """
        if self._detokenizer is None:
            return "", len(token_ids)
        if self._matcher is None:
            return self._detokenizer.push(token_ids[:num_shown]), len(token_ids)
        text = ""
        for i in range(num_shown):  # one by one: a match must know its token
            delta = self._detokenizer.push(token_ids[i : i + 1])
            if len(self._token_ids) + i < self._params.min_tokens:
                text += delta  # too early to stop
            else:
                text += self._match(self._matcher, delta)
            if self.stopped:
                return text, i + 1
        return text, len(token_ids)

    def _match(self, matcher: StopMatcher, delta: str) -> str:
        shown, stop = matcher.push(delta)
        if stop is not None:
            self.stopped = True
            self._finish_reason, self._stop_reason = "stop", stop
        return shown

    def _flush(self) -> str:
        """Text held back, now that no more tokens come."""
        if self._detokenizer is None:
            return ""
        rest = self._detokenizer.flush()
        if self._matcher is None:
            return rest
        shown = self._match(self._matcher, rest)
        return shown if self.stopped else shown + self._matcher.flush()

    def _keep_logprobs(self, logprobs: Sequence[TokenLogprobs]) -> list[dict[int, Logprob]] | None:
        if self._logprobs is None:
            return None
        entries = [logprob_entry(position, self._tokenizer) for position in logprobs]
        self._logprobs += entries
        self._cumulative_logprob += sum(position.logprobs[0] for position in logprobs)
        return entries


def logprob_entry(position: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """One position by token id: the chosen (or prompt) token first, then the most likely ones."""
    chosen, *top = zip(position.token_ids, position.logprobs, strict=True)
    entry = {chosen[0]: Logprob(chosen[1], position.rank, _token_text(tokenizer, chosen[0]))}
    for rank, (token_id, logprob) in enumerate(top, start=1):
        if token_id not in entry:
            entry[token_id] = Logprob(logprob, rank, _token_text(tokenizer, token_id))
    return entry


def prompt_logprob_entries(
    positions: Sequence[TokenLogprobs], tokenizer: Tokenizer | None
) -> list[dict[int, Logprob] | None]:
    """One entry per prompt token; the first token has nothing before it that predicts it."""
    return [None, *(logprob_entry(position, tokenizer) for position in positions)]


def _token_text(tokenizer: Tokenizer | None, token_id: int) -> str | None:
    return None if tokenizer is None else tokenizer.token_text(token_id)
