"""Values that cross every boundary. Plain frozen dataclasses: no torch, no third-party package.

`SamplingParams` and `RequestOutput` follow the names and shapes of vLLM's offline API, so that a
script ports by changing the import.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.errors import InvalidRequestError

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 512
MAX_CHUNKS = 128


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request samples. Field names, meanings and defaults are vLLM's.

    Raises:
        InvalidRequestError: a field is out of range; `param` names it and the message gives the
        range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as many as the context allows
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        for name in ("stop_token_ids", "bad_words"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            allowed = _as_tuple("allowed_token_ids", self.allowed_token_ids)
            object.__setattr__(self, "allowed_token_ids", allowed)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_numbers()
        self._check_lists()

    def _check_numbers(self) -> None:
        _check_int("n", self.n, 1, MAX_N)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).",
                "min_tokens",
            )
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.temperature == 0.0 and self.n > 1:
            raise InvalidRequestError(
                "n must be 1 with temperature 0: greedy choices are all the same.", "n"
            )

    def _check_lists(self) -> None:
        _check_strings("stop", self.stop, MAX_STOP_STRINGS)
        _check_strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        if self.stop and not self.detokenize:
            raise InvalidRequestError(
                "stop strings need detokenize=True; use stop_token_ids instead.", "stop"
            )
        for token_id in self.stop_token_ids or ():
            _check_int("stop_token_ids", token_id, 0, 2**31 - 1)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise InvalidRequestError(
                    "allowed_token_ids must not be empty.", "allowed_token_ids"
                )
            for token_id in self.allowed_token_ids:
                _check_int("allowed_token_ids", token_id, 0, 2**31 - 1)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise InvalidRequestError("logit_bias must map token ids to numbers.", "logit_bias")
            if len(self.logit_bias) > MAX_LOGIT_BIAS:
                raise InvalidRequestError(
                    f"logit_bias has more than {MAX_LOGIT_BIAS} entries.", "logit_bias"
                )
            for token_id, bias in self.logit_bias.items():
                _check_int("logit_bias", token_id, 0, 2**31 - 1)
                _check_float("logit_bias", bias, -100.0, 100.0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self.stop  # type: ignore[return-value]  # __post_init__ made it a tuple

    @property
    def uses_penalties(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """A list as it was given; a bare string would come apart into letters."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable | None):
        raise InvalidRequestError(f"{name} must be a list, not {value!r:.80}.", name)
    return tuple(value or ())


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be an integer, not {type(value).__name__}.", name)
    if not low <= value <= high:
        raise InvalidRequestError(f"{name} must be between {low} and {high}, got {value}.", name)


def _check_float(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequestError(f"{name} must be a number, not {type(value).__name__}.", name)
    too_low = value <= low if open_low else value < low
    if not math.isfinite(value) or too_low or value > high:
        bound = "greater than" if open_low else "at least"
        raise InvalidRequestError(
            f"{name} must be {bound} {low:g} and at most {high:g}, got {value}.", name
        )


def _check_strings(name: str, values: Any, most: int) -> None:
    if len(values) > most:
        raise InvalidRequestError(
            f"{name} has {len(values)} entries; at most {most} are allowed.", name
        )
    for value in values:
        if not isinstance(value, str):
            raise InvalidRequestError(
                f"{name} must hold strings, not {type(value).__name__}.", name
            )
        if not value:
            raise InvalidRequestError(f"{name} must not contain an empty string.", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One sequence to generate, as the engine takes it: tokens only, every choice made, `n` already
    expanded.

    `params.n`, `stop` and the detokenisation fields are the front end's business and ignored here.
    """

    request_id: int  # unique for the life of the engine, chosen by the client
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_total_len: int  # prompt + output, tokens; the request ends with "length" there
    stop_token_ids: tuple[int, ...] = ()  # EOS (unless ignored) and the request's own
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    seed: int = 0  # always set: drawn by the front end where the user gave none
    priority: int = 0  # lower is earlier
    cache_salt: str = ""
    arrival_s: float = 0.0  # time.monotonic()
    deadline_s: float | None = None  # time.monotonic(): ends with "timeout" if not done by then
    client: str = ""  # whose share of the engine it uses
    # Generated already, by an engine that has died: the request goes on after them.
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token and the most likely ones at one position, by raw log-probability (before any
    penalty, bias or temperature). `token_ids[0]` is the chosen (or prompt) token, the rest are the
    top k in falling order; `rank` is the chosen token's (1 = most likely).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The terminal message of a request: exactly one for each that was accepted."""

    request_id: int
    reason: FinishReason
    stop_token_id: int | None = None  # the stop token that ended it; None after EOS
    message: str = ""  # with reason "error": what happened


@dataclass(frozen=True, slots=True)
class Started:
    """A request was scheduled for the first time."""

    request_id: int
    num_cached_tokens: int
    queue_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Gauges after a step, and what the step itself did."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # 0..1
    num_batched_tokens: int = 0
    num_prefix_queries: int = 0  # tokens
    num_prefix_hits: int = 0  # tokens
    num_preemptions: int = 0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutputs:
    """What one step gives the front end. `request_ids[i]` received `token_ids[i]`; a request that
    finished in this step has its last token here as well.
    """

    request_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by request_id
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(
        default_factory=dict
    )  # next prompt positions
    chunks: list[tuple[int, int]] = field(default_factory=list)  # request_id, tokens of its prompt
    started: list[Started] = field(default_factory=list)
    finished: list[Finish] = field(default_factory=list)
    stats: StepStats = field(default_factory=StepStats)


# ---- what the offline API returns


@dataclass(frozen=True, slots=True)
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` outputs."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds, from arrival."""

    queue_s: float = 0.0
    first_token_s: float = 0.0
    e2e_s: float = 0.0


@dataclass(slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


# ---- what an engine says of itself


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts about a running engine that its front ends need: limits, and what start-up took."""

    model: str
    architecture: str
    dtype: str
    device: str
    max_model_len: int  # tokens, prompt + output
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    kv_capacity_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    scheduling_policy: str = "fcfs"
    kv_cache_dtype: str = ""  # "": not told, by a recording of before
    startup_s: dict[str, float] = field(default_factory=dict)  # by phase
    memory_bytes: dict[str, int] = field(
        default_factory=dict
    )  # by use: weights, graphs, workspace, kv, free; host: of the host's, locked for a GPU


@dataclass(slots=True)
class EngineCounts:
    """What has been done so that an engine goes on after its processes have died."""

    num_restarts: int = 0
    num_resumed: int = 0  # requests that went on in another process
    num_isolated: int = 0  # requests given up because they killed engines
    last_recovery_s: float = 0.0  # from a death to the next process's being ready


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a prompt, or of what must be computed again, that one step ran."""

    num_tokens: int
    end_s: float  # time.monotonic()
    step_s: float  # duration of the step, which ran other requests, too


@dataclass(slots=True)
class RequestUpdate:
    """What a request received since its reader last looked: tokens merge, so a slow reader costs
    bounded memory.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token, if asked for
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    chunks: tuple[Chunk, ...] = ()  # at most MAX_CHUNKS; what is more counts as part of the last
    resumed_s: tuple[float, ...] = ()  # time.monotonic() of each start in another engine
    started: Started | None = None
    finish: Finish | None = None
