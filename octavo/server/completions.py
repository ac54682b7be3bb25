"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.answer import Answer
from octavo.server.arrival import receive
from octavo.server.connection import until_disconnect
from octavo.server.decode import decode_body
from octavo.server.generation import Choice, Generation, collect
from octavo.server.logprobs import (
    CompletionLogprobsBuilder,
    Entry,
    prompt_logprobs_body,
)
from octavo.server.params import check_common, completion_params
from octavo.server.prompts import completion_prompts
from octavo.server.requests import CompletionRequest
from octavo.server.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptLogprobs,
    Usage,
    json_response,
)
from octavo.server.sse import event
from octavo.server.state import ServerState
from octavo.text.stream import OutputDelta, prompt_logprob_entries


async def completions(state: ServerState, http: Request) -> Response:
    arrival, body = await receive(state, http)
    request = decode_body(body, CompletionRequest)
    state.check_model(request.model)
    check_common(request)
    params, only_prompt = completion_params(request, state.generation_defaults)
    with arrival.trace.tokenising():
        prompts = await completion_prompts(
            state, request.prompt, request.add_special_tokens is not False
        )
    generation = Generation(state, prompts, params, request, arrival)
    answer = CompletionAnswer(state, http, request, generation, only_prompt)
    if request.stream:
        return answer.stream(http.state.request_id)
    return json_response(await until_disconnect(http.receive, answer.whole()))


class CompletionAnswer(Answer):
    id_prefix = "cmpl"

    def __init__(
        self,
        state: ServerState,
        http: Request,
        request: CompletionRequest,
        generation: Generation,
        only_prompt: bool,
    ) -> None:
        super().__init__(state, http, request, generation)
        self.echo = bool(request.echo)
        self.num_top = request.logprobs
        self.wants_prompt_logprobs = request.prompt_logprobs is not None
        self.only_prompt = only_prompt
        self._logprobs: dict[int, CompletionLogprobsBuilder] = {}

    def usage(self) -> Usage:
        return self.generation.usage(count_output=not self.only_prompt)

    async def whole(self) -> Completion:
        deltas = await collect(self.generation)
        choices = zip(self.generation.choices, deltas, strict=True)
        return self._body([self._choice(choice, delta) for choice, delta in choices], self.usage())

    def chunks(self, choice: Choice, delta: OutputDelta) -> bytes:
        wants_tokens = self.num_top is not None or bool(self.request.return_token_ids)
        says_something = delta.text or delta.finish_reason or (wants_tokens and delta.token_ids)
        if not says_something and not (self.echo and choice.index not in self._begun):
            return b""
        return event(self._body([self._choice(choice, delta)], self.chunk_usage()))

    def usage_chunk(self) -> bytes:
        return event(self._body([], self.usage()))

    def _body(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(
            id=self.id,
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _choice(self, choice: Choice, delta: OutputDelta) -> CompletionChoice:
        """`delta` as a choice; the prompt goes before it where this is the choice's first."""
        first = self.begins(choice)
        prompt_ids = choice.prompt.token_ids if first else []
        text, token_ids, entries = delta.text, delta.token_ids, delta.logprobs
        if self.only_prompt:
            text, token_ids, entries = "", [], None if entries is None else []
        return CompletionChoice(
            index=choice.index,
            text=self._prompt_text(choice) + text if self.echo and first else text,
            logprobs=self._logprobs_body(choice, prompt_ids, token_ids, entries),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            prompt_logprobs=self._prompt_logprobs(choice),
            token_ids=list(token_ids) if self.request.return_token_ids else UNSET,
            prompt_token_ids=list(prompt_ids) if first and self.request.return_token_ids else UNSET,
        )

    def _prompt_text(self, choice: Choice) -> str:
        prompt = choice.prompt
        if prompt.text is None:
            prompt.text = self.state.need_tokenizer().decode(prompt.token_ids)
        return prompt.text

    def _logprobs_body(
        self,
        choice: Choice,
        prompt_ids: Sequence[int],
        token_ids: Sequence[int],
        entries: Sequence[Entry] | None,
    ) -> CompletionLogprobs | None:
        if self.num_top is None:
            return None
        builder = self._logprobs.get(choice.index)
        if builder is None:
            builder = CompletionLogprobsBuilder(self.state.tokenizer, self.num_top)
            self._logprobs[choice.index] = builder
        ids, known = list(token_ids), list[Entry | None](entries or ())
        if self.echo and prompt_ids:
            ids = [*prompt_ids, *ids]
            known = [*prompt_logprob_entries(choice.prompt_logprobs, self.state.tokenizer), *known]
        return builder.build(ids, known)

    def _prompt_logprobs(self, choice: Choice) -> PromptLogprobs | UnsetType:
        if not self.wants_prompt_logprobs:
            return UNSET
        return prompt_logprobs_body(choice.prompt_logprobs, self.state.tokenizer)
