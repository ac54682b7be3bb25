"""The sequences of one HTTP request: submitted together, read as they come, aborted together.

`Generation.__exit__` aborts every sequence that the engine has not finished, however the block was
left: the client went away, a sibling failed, a stop string matched, the task was cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, TypeVar

from octavo.engine.protocol import RequestStream
from octavo.errors import EngineDeadError, InvalidRequestError
from octavo.server.arrival import Arrival
from octavo.server.errors import ApiError, RequestFailedError, deadline_exceeded
from octavo.server.metrics import SequenceTimer
from octavo.server.requests import GenerateRequest
from octavo.server.responses import PromptTokensDetails, Usage
from octavo.server.state import ServerState
from octavo.text.prepare import prepare_requests
from octavo.text.stream import OutputAssembler, OutputDelta
from octavo.types import EngineRequest, Finish, RequestUpdate, SamplingParams, TokenLogprobs

T = TypeVar("T")


# What a slow reader has let pile up is taken in pieces, so that no single write is large.
_MAX_PIECE = 256  # tokens


@dataclass(slots=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None  # as the client sent it, if it sent text


class Assembler(Protocol):
    """What is asked of an `OutputAssembler`."""

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = ...,
        finish: Finish | None = ...,
    ) -> OutputDelta: ...


@dataclass(slots=True)
class Choice:
    """One output sequence; `sample` counts within its prompt, `index` within the response."""

    index: int
    sample: int
    prompt: Prompt
    request: EngineRequest
    assembler: Assembler
    timer: SequenceTimer
    stream: RequestStream | None = None
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    abort_error: ApiError | None = None  # why it was aborted, where that is not the usual reason
    finished: bool = False  # nothing more will be read
    engine_finished: bool = False  # the engine has sent its terminal message

    async def next(self) -> RequestUpdate:
        if self.stream is None:
            raise RuntimeError("read before submit")
        return await self.stream.next()

    def take(self, update: RequestUpdate) -> OutputDelta | None:
        """What `update` adds to the output; None where that is nothing yet.

        Raises:
            ApiError, RequestFailedError: the engine gave the request up.
        """
        if update.started is not None:
            self.num_cached_tokens = update.started.num_cached_tokens
            self.timer.started(update.started.queue_s)
        self.prompt_logprobs.extend(update.prompt_logprobs)
        if update.token_ids:
            self.timer.tokens(len(update.token_ids))
        if update.finish is not None:
            self.engine_finished = True
            self._refuse_failure(update.finish)
        elif not update.token_ids:
            return None
        delta = self.assembler.push(update.token_ids, update.logprobs, update.finish)
        self.num_output_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self.finished = True
            self.timer.finished(delta.finish_reason)
        return delta

    def _refuse_failure(self, finish: Finish) -> None:
        if finish.reason not in ("abort", "error", "timeout"):
            return
        self.finished = True
        self.timer.finished(finish.reason)
        if finish.reason == "error":
            raise RequestFailedError(finish.message or "The engine failed on this request.")
        if finish.reason == "timeout":
            raise deadline_exceeded()
        raise self.abort_error or ApiError(
            503,
            "The server ended this request because it is shutting down; send it again.",
            "aborted",
            type="service_unavailable",
            headers={"retry-after": "1"},
        )


class Generation:
    """All choices of one HTTP request. Everything is validated before anything is submitted.

    Raises:
        InvalidRequestError: a prompt or parameter does not fit this engine.
    """

    def __init__(
        self,
        state: ServerState,
        prompts: list[Prompt],
        params: SamplingParams,
        request: GenerateRequest,
        arrival: Arrival,
    ) -> None:
        self._state = state
        self._arrival = arrival.within(request.timeout)
        self._cause = "abort"  # of sequences that end unfinished
        self.params = params
        self.prompts = prompts
        self.choices: list[Choice] = []
        num_sequences = len(prompts) * params.n
        if num_sequences > state.config.max_sequences:
            raise InvalidRequestError(
                f"{len(prompts)} prompts with n={params.n} make {num_sequences} sequences; "
                f"at most {state.config.max_sequences} are allowed in one request.",
                "n",
            )
        for prompt in prompts:
            self._prepare(prompt, request)
        histograms = state.metrics.histograms
        histograms.params_n.observe(params.n)
        if params.max_tokens is not None:
            histograms.params_max_tokens.observe(params.max_tokens)

    def _prepare(self, prompt: Prompt, request: GenerateRequest) -> None:
        state, arrival = self._state, self._arrival
        if request.priority and state.engine.info.scheduling_policy != "priority":
            raise InvalidRequestError(
                "This server takes requests in order of arrival; start it with "
                "--scheduling-policy priority to use priority.",
                "priority",
            )
        keep = request.truncate_prompt_tokens
        if keep is not None:
            if keep == -1:
                keep = max(state.engine.info.max_model_len - (self.params.max_tokens or 1), 1)
            if len(prompt.token_ids) > keep:
                prompt.token_ids, prompt.text = prompt.token_ids[-keep:], None
        engine_requests = prepare_requests(
            prompt.token_ids,
            self.params,
            state.limits,
            state.tokenizer,
            next_id=state.engine.next_request_id,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
            client=arrival.client,
            arrival_s=arrival.at_s,
            deadline_s=arrival.deadline_s,
        )
        for sample, engine_request in enumerate(engine_requests):
            self.choices.append(
                Choice(
                    index=len(self.choices),
                    sample=sample,
                    prompt=prompt,
                    request=engine_request,
                    assembler=OutputAssembler(self.params, state.tokenizer, prompt.token_ids),
                    timer=SequenceTimer(state.metrics, arrival.at_s, len(prompt.token_ids)),
                )
            )

    def __enter__(self) -> Generation:
        arrival = self._arrival
        requests = [choice.request for choice in self.choices]
        self._state.admission.admit(arrival.client, requests, arrival.deadline_s)
        try:
            for choice in self.choices:
                choice.stream = self._state.engine.submit(choice.request)
                self._state.live[choice.request.request_id] = None
        except BaseException:
            self._close()
            raise
        arrival.trace.watch(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def abort(self, error: ApiError) -> None:
        """End it from outside; its client gets `error`."""
        unfinished = [choice for choice in self.choices if not choice.engine_finished]
        for choice in unfinished:
            choice.abort_error = error
        self._state.engine.abort([choice.request.request_id for choice in unfinished])

    def _close(self) -> None:
        submitted = [c for c in self.choices if c.stream is not None]
        unfinished = [c for c in submitted if not c.engine_finished]
        if unfinished:
            self._state.engine.abort([c.request.request_id for c in unfinished])
        for choice in self.choices:
            self._state.admission.leave(choice.request, choice.timer.num_tokens)
        for choice in submitted:
            self._state.live.pop(choice.request.request_id, None)
            if not choice.finished:
                choice.finished = True
                choice.timer.finished(self._cause)

    async def outputs(self) -> AsyncGenerator[tuple[Choice, OutputDelta], None]:
        """Every delta of every choice as it comes. A choice is read again only after its last
        delta was taken, and what arrives meanwhile merges in the engine's stream.
        """
        if len(self.choices) > 1:
            async for item in self._interleaved():
                yield item
            return
        choice = self.choices[0]
        while not choice.finished:
            update = await self._in_time(choice.next())
            for i, delta in enumerate(self._take(choice, update)):
                if i:  # a lot has piled up: others want to be heard in between
                    await asyncio.sleep(0)
                yield choice, delta

    async def _interleaved(self) -> AsyncGenerator[tuple[Choice, OutputDelta], None]:
        ready: asyncio.Queue[tuple[Choice, asyncio.Task[RequestUpdate]]] = asyncio.Queue()
        tasks: dict[int, asyncio.Task[RequestUpdate]] = {}

        def read(choice: Choice) -> None:
            task = asyncio.create_task(choice.next())
            task.add_done_callback(lambda task: ready.put_nowait((choice, task)))
            tasks[choice.index] = task

        for choice in self.choices:
            read(choice)
        try:
            while tasks:
                choice, task = await self._in_time(ready.get())
                del tasks[choice.index]
                for i, delta in enumerate(self._take(choice, task.result())):
                    if i:
                        await asyncio.sleep(0)
                    yield choice, delta
                if not choice.finished:
                    read(choice)
        finally:
            for task in tasks.values():
                task.cancel()

    async def _in_time(self, coming: Coroutine[Any, Any, T]) -> T:
        """What comes, unless the deadline does. The engine watches it too, but may not be there."""
        deadline_s = self._arrival.deadline_s
        if deadline_s is None:
            return await coming
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                return await coming
        except TimeoutError:
            self._cause = "timeout"
            raise deadline_exceeded() from None

    def _take(self, choice: Choice, update: RequestUpdate) -> Iterator[OutputDelta]:
        for piece in _pieces(update):
            if choice.finished:
                return
            if (delta := self._take_piece(choice, piece)) is not None:
                yield delta

    def _take_piece(self, choice: Choice, update: RequestUpdate) -> OutputDelta | None:
        try:
            delta = choice.take(update)
        except RequestFailedError as exc:
            if self._state.engine.is_alive:
                raise
            raise EngineDeadError(str(exc)) from None
        if choice.finished and not choice.engine_finished:  # a stop string matched
            self._state.engine.abort([choice.request.request_id])
            choice.engine_finished = True
        return delta

    def usage(self, *, count_output: bool = True) -> Usage:
        """Tokens so far. A prompt counts once, however many outputs it has."""
        first = [c for c in self.choices if c.sample == 0]
        num_prompt = sum(len(c.prompt.token_ids) for c in first)
        num_output = sum(c.num_output_tokens for c in self.choices) if count_output else 0
        cached = PromptTokensDetails(sum(c.num_cached_tokens for c in first))
        return Usage(num_prompt, num_output, num_prompt + num_output, cached)


def _pieces(update: RequestUpdate) -> Iterable[RequestUpdate]:
    """`update`, in parts of at most `_MAX_PIECE` tokens."""
    num_tokens = len(update.token_ids)
    if num_tokens <= _MAX_PIECE:
        return (update,)
    pieces = [
        RequestUpdate(
            token_ids=update.token_ids[start : start + _MAX_PIECE],
            logprobs=update.logprobs[start : start + _MAX_PIECE],
        )
        for start in range(0, num_tokens, _MAX_PIECE)
    ]
    pieces[0].started, pieces[0].prompt_logprobs = update.started, update.prompt_logprobs
    pieces[-1].finish = update.finish
    return pieces


async def collect(generation: Generation) -> list[OutputDelta]:
    """Each choice's whole output as one delta, in the order of the choices."""
    parts: list[list[OutputDelta]] = [[] for _ in generation.choices]
    with generation:
        async for choice, delta in generation.outputs():
            parts[choice.index].append(delta)
    return [_merged(deltas) for deltas in parts]


def _merged(deltas: list[OutputDelta]) -> OutputDelta:
    has_logprobs = any(d.logprobs is not None for d in deltas)
    return OutputDelta(
        text="".join(d.text for d in deltas),
        token_ids=[t for d in deltas for t in d.token_ids],
        logprobs=[e for d in deltas for e in d.logprobs or ()] if has_logprobs else None,
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )
