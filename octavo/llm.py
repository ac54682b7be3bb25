"""The offline API: a model in this process, many prompts in, their outputs back in order."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

from tqdm import tqdm

from octavo.checkpoint import locate_from
from octavo.config import EngineArgs
from octavo.engine.build import build_core
from octavo.engine.core import EngineCore
from octavo.errors import ConfigError, EngineError, InvalidRequestError
from octavo.text.chat_template import need_chat_template, open_text
from octavo.text.prepare import Limits, prepare_requests
from octavo.text.stream import OutputAssembler, OutputDelta, prompt_logprob_entries
from octavo.text.tokenizer import Tokenizer
from octavo.types import (
    CompletionOutput,
    EngineInfo,
    EngineRequest,
    Finish,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    StepOutputs,
    TokenLogprobs,
)

Prompt = str | Mapping[str, Any] | Sequence[int]
Message = Mapping[str, Any]


@dataclass(slots=True)
class _Job:
    """One prompt on its way: `n` engine requests whose outputs make one `RequestOutput`."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    request_ids: list[int]
    assemblers: list[OutputAssembler]
    arrival_s: float
    num_unfinished: int
    is_counted: bool = False  # by the progress bar
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    queue_s: float = 0.0
    first_token_s: float = 0.0
    e2e_s: float = 0.0


class _Owner(NamedTuple):
    """Who receives what an engine request generates."""

    job: _Job
    assembler: OutputAssembler
    inbox: deque[tuple[_Job, OutputDelta]]  # of the call that the job belongs to


class LLM:
    """A model to generate with, in this process.

    Args:
        model: a built-in name ("smollm2-135m"), a hub id, a folder or a .gguf file.
        **options: any of `octavo.config.EngineArgs`, under vLLM's names where the meaning is the
            same: dtype, max_model_len, max_num_seqs, max_num_batched_tokens, seed, ...

    Raises:
        ConfigError: an unknown option, or one that cannot be honoured.
        CheckpointError, UnsupportedModelError: the model cannot be loaded.

    Use it as a context manager, or call `close()`, to free the model's memory.
    """

    def __init__(self, model: str = "smollm2-135m", **options: Any) -> None:
        self._args = EngineArgs.from_options(model=model, **options)
        checkpoint = locate_from(self._args)
        self._tokenizer, self._chat_template = open_text(checkpoint)
        self._core: EngineCore | None = build_core(self._args, checkpoint, progress=True)
        self._limits = Limits.from_info(self._core.info)
        self._ids = itertools.count(1)
        self._seeds = (
            itertools.count(options["seed"] << 32, 1024) if "seed" in options else None
        )  # of prompts whose parameters bring none, each with room for its n outputs
        # Live engine requests of all calls: a stream may be open while others are made.
        self._owners: dict[int, _Owner] = {}

    @property
    def info(self) -> EngineInfo:
        """The engine's limits, memory and start-up times."""
        return self._engine().info

    def get_tokenizer(self) -> Tokenizer:
        """Raises ConfigError for a model without one."""
        if self._tokenizer is None:
            raise ConfigError(
                f"{self._args.model} has no tokenizer: pass token ids, or set tokenizer=."
            )
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate from each prompt; outputs come in the order of the prompts.

        Args:
            prompts: a string, a list of token ids, {"prompt": str} or {"prompt_token_ids": [...]},
                or a list of these; {"cache_salt": str} may be added to a mapping.
            sampling_params: one for all, or one per prompt; default `SamplingParams()`.
            use_tqdm: show a progress bar.
            priority: one per prompt, lower is earlier; needs scheduling_policy="priority".

        Raises:
            InvalidRequestError: a prompt or its parameters cannot be served; nothing was generated.
            ConfigError: priorities without scheduling_policy="priority", or lists of other lengths.
        """
        if priority is not None and self._args.scheduling_policy != "priority":
            raise ConfigError('priority needs LLM(..., scheduling_policy="priority").')
        items = _as_list(prompts)
        all_params = _per_prompt("sampling_params", sampling_params or SamplingParams(), len(items))
        priorities = _per_prompt("priority", 0 if priority is None else priority, len(items))
        jobs, requests = [], []
        for item, params, rank in zip(items, all_params, priorities, strict=True):
            job, job_requests = self._prepare(item, params, rank)
            jobs.append(job)
            requests.extend(job_requests)
        with tqdm(total=len(jobs), desc="generate", unit="prompt", disable=not use_tqdm) as bar:
            for job, _ in self._run(jobs, requests):
                if not (job.num_unfinished or job.is_counted):
                    job.is_counted = True
                    bar.update()
        return [self._output(index, job) for index, job in enumerate(jobs)]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams) -> Iterator[OutputDelta]:
        """Generate from one prompt (n=1), piece by piece. Closing the iterator ends the request.

        Raises:
            InvalidRequestError: the prompt or its parameters cannot be served.
        """
        if sampling_params.n != 1:
            raise InvalidRequestError("stream() generates one output: n must be 1.", "n")
        job, requests = self._prepare(prompt, sampling_params, 0)
        return (delta for _, delta in self._run([job], requests))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation, or of each of several.

        Raises:
            InvalidRequestError: a message is malformed or the model has no chat template.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        prompts = [
            self.chat_prompt(
                conversation,
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> dict[str, list[int]]:
        """A conversation as a prompt for `generate` or `stream`; `kwargs` go to the template.

        Raises:
            InvalidRequestError: a message is malformed or the model has no chat template.
        """
        template = need_chat_template(self._chat_template)
        text = template.render(messages, add_generation_prompt=add_generation_prompt, **kwargs)
        # The template has put the special tokens in.
        return {"prompt_token_ids": self.get_tokenizer().encode(text, add_special_tokens=False)}

    def close(self) -> None:
        """Free the model. The object cannot be used afterwards."""
        if self._core is not None:
            self._core.close()
            self._core = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _engine(self) -> EngineCore:
        if self._core is None:
            raise EngineError("This LLM has been closed; make a new one.")
        return self._core

    def _prepare(
        self, item: Prompt, params: SamplingParams, priority: int
    ) -> tuple[_Job, list[EngineRequest]]:
        prompt, token_ids, salt = self._tokens_of(item)
        arrival_s = time.monotonic()
        requests = prepare_requests(
            token_ids,
            params,
            self._limits,
            self._tokenizer,
            next_id=self._ids.__next__,
            default_seed=None if self._seeds is None else next(self._seeds),
            priority=priority,
            cache_salt=salt,
            arrival_s=arrival_s,
        )
        assemblers = [OutputAssembler(params, self._tokenizer, token_ids) for _ in requests]
        ids = [request.request_id for request in requests]
        return _Job(prompt, token_ids, params, ids, assemblers, arrival_s, len(ids)), requests

    def _tokens_of(self, item: Prompt) -> tuple[str | None, list[int], str]:
        """The prompt's text where there is one, its token ids, its cache salt."""
        if isinstance(item, str):
            return item, self.get_tokenizer().encode(item), ""
        if not isinstance(item, Mapping):
            return None, _token_list(item), ""
        unknown = set(item) - {"prompt", "prompt_token_ids", "cache_salt"}
        if unknown or ("prompt" in item) == ("prompt_token_ids" in item):
            raise InvalidRequestError(
                "A prompt mapping needs exactly one of 'prompt' and 'prompt_token_ids' "
                f"(and may have 'cache_salt'), got {sorted(item)}.",
                "prompt",
            )
        salt = item.get("cache_salt") or ""
        if not isinstance(salt, str):
            raise InvalidRequestError("cache_salt must be a string.", "cache_salt")
        if "prompt" in item:
            return item["prompt"], self.get_tokenizer().encode(item["prompt"]), salt
        return None, _token_list(item["prompt_token_ids"]), salt

    def _run(
        self, jobs: list[_Job], requests: list[EngineRequest]
    ) -> Iterator[tuple[_Job, OutputDelta]]:
        """Step until the jobs are done, yielding what each step brings them. Whatever ends this
        early, the engine is left without their requests.
        """
        core = self._engine()
        inbox: deque[tuple[_Job, OutputDelta]] = deque()
        mine = {
            request_id: _Owner(job, assembler, inbox)
            for job in jobs
            for request_id, assembler in zip(job.request_ids, job.assemblers, strict=True)
        }
        self._owners |= mine
        try:
            for request in requests:
                core.add(request)
            while inbox or (core.has_work and not self._owners.keys().isdisjoint(mine)):
                if inbox:
                    yield inbox.popleft()
                else:
                    self._step(self._engine())
            if any(job.num_unfinished for job in jobs):
                raise EngineError("A step failed in another call and took this request with it.")
        finally:
            core.abort(mine)
            for request_id in mine:
                self._owners.pop(request_id, None)

    def _step(self, core: EngineCore) -> None:
        """One step; its outputs reach the calls that they belong to."""
        try:
            outputs = core.step()
        except BaseException:  # Ctrl-C as well: what was in the step cannot go on
            core.abort(self._owners)
            self._owners.clear()
            raise
        if outputs is None:
            return
        for request_id in _take(core, outputs, self._owners):
            del self._owners[request_id]

    def _output(self, index: int, job: _Job) -> RequestOutput:
        wants_prompt = job.params.prompt_logprobs is not None
        outputs: list[CompletionOutput] = [
            assembler.completion(i) for i, assembler in enumerate(job.assemblers)
        ]
        return RequestOutput(
            request_id=str(index),
            prompt=job.prompt,
            prompt_token_ids=job.prompt_token_ids,
            outputs=outputs,
            prompt_logprobs=prompt_logprob_entries(job.prompt_logprobs, self._tokenizer)
            if wants_prompt
            else None,
            num_cached_tokens=job.num_cached_tokens,
            metrics=RequestMetrics(job.queue_s, job.first_token_s, job.e2e_s),
        )


def _take(core: EngineCore, outputs: StepOutputs, owners: Mapping[int, _Owner]) -> list[int]:
    """Give a step's tokens to their assemblers; abort what has met a stop string. Outputs of calls
    that were given up have no owner any more. The requests that are done.
    """
    now_s = time.monotonic()
    finishes: dict[int, Finish] = {finish.request_id: finish for finish in outputs.finished}
    done = []
    for started in outputs.started:
        if (owner := owners.get(started.request_id)) is not None:
            cached = max(owner.job.num_cached_tokens, started.num_cached_tokens)
            owner.job.num_cached_tokens, owner.job.queue_s = cached, started.queue_s
    for request_id, entries in outputs.prompt_logprobs.items():
        owner = owners.get(request_id)
        if owner is not None and request_id == owner.job.request_ids[0]:
            owner.job.prompt_logprobs.extend(entries)
    for request_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
        if (owner := owners.get(request_id)) is None:
            continue
        job, assembler, inbox = owner
        job.first_token_s = job.first_token_s or now_s - job.arrival_s
        logprobs = outputs.logprobs.get(request_id)
        finish = finishes.get(request_id)
        inbox.append((job, assembler.push([token_id], [logprobs] if logprobs else [], finish)))
        if assembler.stopped and finish is None:
            core.abort([request_id])
        if assembler.finished:
            job.num_unfinished -= 1
            job.e2e_s = now_s - job.arrival_s
            done.append(request_id)
    return done


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [items]  # type: ignore[list-item]  # one prompt of token ids
    return items  # type: ignore[return-value]


def _token_list(item: Any) -> list[int]:
    """Token ids as a list; what is in it is checked with the rest of the request."""
    if isinstance(item, (str, bytes)) or not isinstance(item, Sequence):
        raise InvalidRequestError(
            f"A prompt must be a string, a mapping or a list of token ids, not {item!r:.80}.",
            "prompt",
        )
    return list(item)


def _per_prompt(name: str, value: Any, num_prompts: int) -> list[Any]:
    if isinstance(value, (SamplingParams, int)):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise ConfigError(f"{name} has {len(value)} entries for {num_prompts} prompts.")
    return list(value)
