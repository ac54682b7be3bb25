"""POST /v1/chat/completions."""

from __future__ import annotations

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.answer import Answer
from octavo.server.arrival import receive
from octavo.server.connection import until_disconnect
from octavo.server.decode import decode_body
from octavo.server.generation import Choice, Generation, collect
from octavo.server.logprobs import chat_logprobs, prompt_logprobs_body
from octavo.server.params import chat_params, check_common
from octavo.server.prompts import chat_prompt
from octavo.server.requests import ChatRequest
from octavo.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    PromptLogprobs,
    Usage,
    json_response,
)
from octavo.server.sse import event
from octavo.server.state import ServerState
from octavo.text.stream import OutputDelta


async def chat_completions(state: ServerState, http: Request) -> Response:
    arrival, body = await receive(state, http)
    request = decode_body(body, ChatRequest)
    state.check_model(request.model)
    check_common(request)
    params = chat_params(request, state.generation_defaults)
    with arrival.trace.tokenising():
        prompt = await chat_prompt(state, request, bool(request.add_special_tokens), len(body))
    generation = Generation(state, [prompt], params, request, arrival)
    answer = ChatAnswer(state, http, request, generation)
    if request.stream:
        return answer.stream(http.state.request_id)
    return json_response(await until_disconnect(http.receive, answer.whole()))


class ChatAnswer(Answer):
    id_prefix = "chatcmpl"

    def __init__(
        self, state: ServerState, http: Request, request: ChatRequest, generation: Generation
    ) -> None:
        super().__init__(state, http, request, generation)
        self.wants_logprobs = bool(request.logprobs)
        self.num_top = request.top_logprobs or 0

    async def whole(self) -> ChatCompletion:
        deltas = await collect(self.generation)
        first = self.generation.choices[0]
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=AssistantMessage(delta.text),
                    logprobs=self._logprobs(delta),
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                    token_ids=self._token_ids(delta),
                )
                for choice, delta in zip(self.generation.choices, deltas, strict=True)
            ],
            usage=self.usage(),
            prompt_logprobs=self._prompt_logprobs(first),
            prompt_token_ids=self._prompt_token_ids(first),
        )

    def chunks(self, choice: Choice, delta: OutputDelta) -> bytes:
        """As OpenAI sends them: the role first, then content, then an empty delta with the
        finish reason.
        """
        events = []
        if self.begins(choice):
            opening = ChatChunkChoice(index=choice.index, delta=ChatDelta("assistant", ""))
            events.append(self._chunk([opening], self._prompt_token_ids(choice)))
        wants_tokens = self.wants_logprobs or bool(self.request.return_token_ids)
        if delta.text or (wants_tokens and delta.token_ids):
            content = ChatChunkChoice(
                index=choice.index,
                delta=ChatDelta(content=delta.text),
                logprobs=self._logprobs(delta),
                token_ids=self._token_ids(delta),
            )
            events.append(self._chunk([content]))
        if delta.finish_reason is not None:
            closing = ChatChunkChoice(
                index=choice.index,
                delta=ChatDelta(),
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
            )
            events.append(self._chunk([closing]))
        return b"".join(events)

    def usage_chunk(self) -> bytes:
        return self._chunk([], usage=self.usage())

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        prompt_token_ids: list[int] | UnsetType = UNSET,
        usage: Usage | UnsetType | None = UNSET,
    ) -> bytes:
        return event(
            ChatChunk(
                id=self.id,
                created=self.created,
                model=self.model,
                system_fingerprint=self.fingerprint,
                choices=choices,
                usage=self.chunk_usage() if usage is UNSET else usage,
                prompt_token_ids=prompt_token_ids,
            )
        )

    def _logprobs(self, delta: OutputDelta) -> ChatLogprobs | None:
        if not self.wants_logprobs:
            return None
        return chat_logprobs(
            delta.token_ids, delta.logprobs or [], self.num_top, self.state.tokenizer
        )

    def _token_ids(self, delta: OutputDelta) -> list[int] | UnsetType:
        return list(delta.token_ids) if self.request.return_token_ids else UNSET

    def _prompt_token_ids(self, choice: Choice) -> list[int] | UnsetType:
        return list(choice.prompt.token_ids) if self.request.return_token_ids else UNSET

    def _prompt_logprobs(self, choice: Choice) -> PromptLogprobs | UnsetType:
        if self.request.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs_body(choice.prompt_logprobs, self.state.tokenizer)
