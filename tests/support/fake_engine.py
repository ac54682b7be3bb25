"""An `AsyncEngine` without a model: it says what a script tells it to, one token a step."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from octavo.checkpoint import Checkpoint
from octavo.errors import EngineDeadError
from octavo.types import (
    Chunk,
    EngineCounts,
    EngineInfo,
    EngineRequest,
    Finish,
    RequestUpdate,
    Started,
    StepOutputs,
    StepStats,
    TokenLogprobs,
)

EOS, IM_START, IM_END = 0, 1, 2
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer_json() -> str:
    """A tokenizer.json with three special tokens and one token per byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = ["<eos>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer.to_str()


def byte_checkpoint() -> Checkpoint:
    """A checkpoint that has a tokenizer and a chat template and no weights."""
    return Checkpoint(
        model="fake",
        path=Path("fake"),
        weights_format="none",
        weight_files=(),
        config={"vocab_size": len(json.loads(byte_tokenizer_json())["model"]["vocab"])},
        tokenizer_config={"eos_token": "<eos>"},
        tokenizer_json=byte_tokenizer_json(),
        chat_template=CHATML,
    )


def fake_info(
    max_model_len: int = 256, kv_capacity_tokens: int = 1024, max_num_seqs: int = 8
) -> EngineInfo:
    return EngineInfo(
        model="fake/model",
        architecture="FakeForCausalLM",
        dtype="float32",
        device="cpu",
        max_model_len=max_model_len,
        vocab_size=259,
        eos_token_ids=(EOS, IM_END),
        kv_cache_dtype="float32",
        block_size=16,
        num_blocks=kv_capacity_tokens // 16,
        kv_capacity_tokens=kv_capacity_tokens,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=128,
        enable_prefix_caching=True,
        scheduling_policy="priority",
        startup_s={"load": 0.5},
        memory_bytes={"weights": 1000, "kv": 2000},
    )


class FakeStream:
    def __init__(self) -> None:
        self._update = RequestUpdate()
        self._event = asyncio.Event()

    async def next(self) -> RequestUpdate:
        await self._event.wait()
        self._event.clear()
        update, self._update = self._update, RequestUpdate()
        return update

    def put(self) -> RequestUpdate:
        self._event.set()
        return self._update


class FakeEngine:
    """`reply(request)` gives the tokens to say; after them comes EOS. `step_s` passes between
    tokens; with `hang` nothing is ever said. `fail` holds what a request ends with, after two
    tokens. With `num_rows` set, only so many requests speak at once; the others wait their turn.
    """

    def __init__(
        self, reply: Callable[[EngineRequest], Sequence[int]], info: EngineInfo | None = None
    ) -> None:
        self.info = info or fake_info()
        self.counts = EngineCounts()
        self.reply = reply
        self.step_s = 0.0
        self.hang = False
        self.num_rows: int | None = None
        self.num_running = 0
        self.fail: str | None = None
        self.is_alive = True
        self.trouble: str | None = None
        self.num_cached_tokens = 0
        self.resumed_s: list[float] = []  # told with each request's start
        self.submitted: list[EngineRequest] = []
        self.aborted: list[int] = []
        self._ids = itertools.count(1)
        self._live: dict[int, tuple[FakeStream, asyncio.Task[None]]] = {}
        self._listeners: list[Callable[[StepOutputs], None]] = []

    @property
    def num_live(self) -> int:
        return len(self._live)

    def next_request_id(self) -> int:
        return next(self._ids)

    def add_listener(self, listener: Callable[[StepOutputs], None]) -> None:
        self._listeners.append(listener)

    def submit(self, request: EngineRequest) -> FakeStream:
        if not self.is_alive:
            raise EngineDeadError("killed by the test")
        self.submitted.append(request)
        stream = FakeStream()
        task = asyncio.ensure_future(self._generate(request, stream))
        self._live[request.request_id] = (stream, task)
        return stream

    def abort(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            if request_id in self._live:
                stream, task = self._live.pop(request_id)
                task.cancel()
                self.aborted.append(request_id)
                stream.put().finish = Finish(request_id, "abort")
                self._tell(StepOutputs(finished=[Finish(request_id, "abort")]))

    async def close(self) -> None:
        self.abort(list(self._live))

    async def _generate(self, request: EngineRequest, stream: FakeStream) -> None:
        while self.num_rows is not None and self.num_running >= self.num_rows:
            await asyncio.sleep(0.002)
        self.num_running += 1
        try:
            await self._speak(request, stream)
        finally:
            self.num_running -= 1

    async def _speak(self, request: EngineRequest, stream: FakeStream) -> None:
        request_id, params = request.request_id, request.params
        started = Started(request_id, self.num_cached_tokens, 0.001)
        await asyncio.sleep(0.001)
        update = stream.put()
        update.started = started
        update.resumed_s = tuple(self.resumed_s)
        half = len(request.prompt_token_ids) // 2
        for num_tokens in (half, len(request.prompt_token_ids) - half):
            update.chunks += (Chunk(num_tokens, time.monotonic(), 0.0005),)
        self._tell(StepOutputs(started=[started]))
        if params.prompt_logprobs is not None:
            stream.put().prompt_logprobs.extend(
                _logprobs(t, params.prompt_logprobs) for t in request.prompt_token_ids[1:]
            )
        room = request.max_total_len - len(request.prompt_token_ids)
        tokens = [*self.reply(request), EOS]
        while self.hang:
            await asyncio.sleep(0.01)
        for position, token in enumerate(tokens):
            await asyncio.sleep(self.step_s)
            if self.fail is not None and position == 2:
                self._finish(stream, Finish(request_id, "error", message=self.fail))
                return
            update = stream.put()
            update.token_ids.append(token)
            if params.logprobs is not None:
                update.logprobs.append(_logprobs(token, params.logprobs))
            finish = None
            if token in request.stop_token_ids and position + 1 >= params.min_tokens:
                own = token not in self.info.eos_token_ids
                finish = Finish(request_id, "stop", stop_token_id=token if own else None)
            elif position + 1 >= room:
                finish = Finish(request_id, "length")
            stats = StepStats(num_running=self.num_running, num_batched_tokens=1, step_s=0.002)
            self._tell(
                StepOutputs(
                    request_ids=[request_id],
                    token_ids=[token],
                    finished=[finish] if finish else [],
                    stats=stats,
                )
            )
            if finish is not None:
                self._finish(stream, finish)
                return
        self._finish(stream, Finish(request_id, "length"))

    def _tell(self, outputs: StepOutputs) -> None:
        for listener in self._listeners:
            listener(outputs)

    def _finish(self, stream: FakeStream, finish: Finish) -> None:
        self._live.pop(finish.request_id, None)
        stream.put().finish = finish


def _logprobs(token: int, top: int) -> TokenLogprobs:
    """The chosen token is the second most likely; the others are its neighbours."""
    others = [(token + i) % 259 for i in range(1, top + 1)]
    ranked = [others[0], token, *others[1:]][:top] if top else []
    best = {t: -0.5 * (rank + 1) for rank, t in enumerate(ranked)}
    return TokenLogprobs((token, *ranked), (best.get(token, -1.0), *best.values()), 2)
