"""`Admission`: how much may wait for the engine, and what those are told who come too many.

A sequence waits from its submission until the engine starts it. Limits are checked before work is
spent: the number of sequences before a body is even parsed, tokens once a prompt has become some.
Nothing that has been let in is thrown out again.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.config.server import ServerConfig
from octavo.server.errors import ApiError, deadline_exceeded
from octavo.types import EngineInfo, EngineRequest, StepOutputs

# Default limits. Sequences: four service rounds of a full engine. Tokens: so many steps of nothing
# but prompts: 6 s (0.6B) and 51 s (8B) on an H100, about a minute for 135M on two CPU cores.
_ROUNDS = 4
_PREFILL_STEPS = 256

_WINDOW_S = 10.0  # of the measured rate
_FULL_CACHE = 0.9  # share in use beyond which memory, not rows, keeps sequences waiting
_EXPECTED_OUTPUT = 128.0  # tokens, before any sequence has finished
_OUTPUT_MEMORY = 50  # finished sequences that the mean goes back to

_MAX_NAMES = 1000  # clients that are counted by name; the rest together
_OTHERS = "others"

_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_JITTER = 0.2  # so that those who were refused together do not come back together


class RateMeter:
    """Tokens per busy second, over about the last ten."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        keep = math.exp(-seconds / _WINDOW_S)
        self._num_tokens = self._num_tokens * keep + num_tokens
        self._seconds = self._seconds * keep + seconds

    @property
    def per_s(self) -> float:
        """0 while nothing was measured."""
        return self._num_tokens / self._seconds if self._seconds > 0 else 0.0


@dataclass(slots=True)
class _Load:
    """What waits: of one client, or of all."""

    num_sequences: int = 0
    num_tokens: int = 0  # of prompts
    work: float = 0.0  # tokens, prompt and expected output

    def add(self, sequence: _Sequence, sign: int = 1) -> None:
        self.num_sequences += sign
        self.num_tokens += sign * sequence.num_tokens
        self.work = max(0.0, self.work + sign * sequence.work)


@dataclass(slots=True)
class _Sequence:
    client: str
    num_tokens: int
    work: float
    waits: bool = True


class Admission:
    """Counts what waits, by client and in all; refuses what is too much.

    A client that has less than its share of the queue (the limits, divided by the clients that
    wait) is let in even if others have filled it: with k clients the queue can then hold up to
    1 + 1/2 + ... + 1/k times the limit. Whatever its size, a request is let in when nothing waits.
    """

    def __init__(
        self,
        config: ServerConfig,
        info: EngineInfo,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.max_requests = _limit(config.max_queue_requests, _ROUNDS * info.max_num_seqs)
        self.max_tokens = _limit(
            config.max_queue_tokens, _PREFILL_STEPS * info.max_num_batched_tokens
        )
        self.num_refused_by_client: Counter[str] = Counter()
        self.num_tokens_by_client: Counter[str] = Counter()  # prompt and output, when it ends
        self._num_rows = info.max_num_seqs
        self._in_order = info.scheduling_policy != "priority"
        self._clock, self._jitter = clock, jitter
        self._sequences: dict[int, _Sequence] = {}  # live ones, by request id
        self._waiting = _Load()
        self._by_client: dict[str, _Load] = {}  # of those that wait
        self._rate = RateMeter()
        self._last_step_s: float | None = None  # None: idle since
        self._cache_is_full = False
        self._mean_output = _EXPECTED_OUTPUT
        self._num_finished = 0
        self._promised_s = -math.inf  # when the last one who was refused may come back

    # -- what waits

    @property
    def num_waiting(self) -> int:
        """Sequences."""
        return self._waiting.num_sequences

    @property
    def num_waiting_tokens(self) -> int:
        """Of the prompts of waiting sequences."""
        return self._waiting.num_tokens

    @property
    def tokens_per_s(self) -> float:
        """Measured: prompt tokens, from the cache or not, and output."""
        return self._rate.per_s

    def predicted_wait_s(self, client: str | None = None) -> float:
        """Until a sequence that comes now would be started: one of `client`, whose turn comes
        before that of others who have more waiting, or one behind all others. 0 if nothing is
        known.
        """
        rate = self.tokens_per_s
        return self._work_ahead(client) / rate if rate > 0 else 0.0

    def _work_ahead(self, client: str | None) -> float:
        if client is None:
            return self._cost(self._waiting)
        own = self._by_client.get(client)
        own_cost = self._cost(own) if own else 0.0
        return own_cost + sum(
            min(self._cost(load), own_cost + self._mean_output)
            for name, load in self._by_client.items()
            if name != client
        )

    def _cost(self, load: _Load) -> float:
        """Tokens to compute before what waits has been started: with all rows taken, one starts
        when another has ended; else prompts are all there is to wait for.
        """
        return load.work if self._is_full else float(load.num_tokens)

    @property
    def _num_running(self) -> int:
        return len(self._sequences) - self._waiting.num_sequences

    @property
    def _is_full(self) -> bool:
        return self._num_running >= self._num_rows or self._cache_is_full

    # -- requests come

    def check_count(self, client: str, num_sequences: int = 1) -> None:
        """Refuse a request by the number of sequences alone. ApiError 429."""
        over = self._num_over(client, num_sequences)
        if over:
            self._refuse_full(client, self.max_requests, "requests", over, num_sequences)

    def admit(
        self, client: str, requests: Sequence[EngineRequest], deadline_s: float | None = None
    ) -> None:
        """Count the sequences of one request as waiting, all or none.

        Raises:
            ApiError: 429, too much waits already, or it could not be served by its deadline.
        """
        self.check_count(client, len(requests))
        num_tokens = sum(len(request.prompt_token_ids) for request in requests)
        over = self._tokens_over(client, num_tokens)
        if over:
            self._refuse_full(client, self.max_tokens, "prompt tokens", over, len(requests))
        if deadline_s is not None:
            self._check_deadline(client, deadline_s)
        for request in requests:
            self._enter(client, request)

    def _num_over(self, client: str, num_sequences: int) -> float:
        """The share of the queue that must go before there is room for so many more."""
        waiting, limit = self._waiting.num_sequences, self.max_requests
        # Sequences for which a row is free do not queue: they will start with the next step.
        free = max(0, self._num_rows - self._num_running)
        over = waiting - free + num_sequences - limit
        if not limit or not waiting or over <= 0:
            return 0.0
        own = self._by_client.get(client, _Load()).num_sequences
        if own + num_sequences <= limit // self._num_sharing(client):
            return 0.0
        return min(1.0, over / waiting)

    def _tokens_over(self, client: str, num_tokens: int) -> float:
        waiting, limit = self._waiting.num_tokens, self.max_tokens
        over = waiting + num_tokens - limit
        if not limit or not waiting or over <= 0:
            return 0.0
        own = self._by_client.get(client, _Load()).num_tokens
        if own + num_tokens <= limit // self._num_sharing(client):
            return 0.0
        return min(1.0, over / waiting)

    def _num_sharing(self, client: str) -> int:
        return len(self._by_client) + (client not in self._by_client)

    def _check_deadline(self, client: str, deadline_s: float) -> None:
        left_s = deadline_s - self._clock()
        if left_s <= 0:
            raise deadline_exceeded()
        # By priority, who comes last may be first: only time will tell.
        wait_s = self.predicted_wait_s(client) if self._in_order else 0.0
        if wait_s <= left_s:
            return
        _count(self.num_refused_by_client, client, 1)
        raise ApiError(
            429,
            "The request would not be started before its timeout: too many are waiting. Send it "
            "again later, or with a longer timeout.",
            "deadline_unreachable",
            type="rate_limit_error",
            headers=self._retry_headers(wait_s - left_s),
        )

    def _refuse_full(
        self, client: str, limit: int, what: str, over: float, num_sequences: int
    ) -> None:
        _count(self.num_refused_by_client, client, 1)
        rate = self.tokens_per_s
        wait_s = self.predicted_wait_s()
        own_s = num_sequences * self._mean_work / rate if rate > 0 else 0.0
        # There will be room for one, but not for all who are refused meanwhile: each is promised a
        # time of its own, as far apart as the engine takes to serve them.
        now_s = self._clock()
        at_s = max(now_s + over * wait_s, self._promised_s + own_s)
        self._promised_s = min(at_s, now_s + _MAX_RETRY_S)
        raise ApiError(
            429,
            f"The server's queue is full: it holds {limit} waiting {what}. Send this again later.",
            "queue_full",
            type="rate_limit_error",
            headers=self._retry_headers(at_s - now_s),
        )

    @property
    def _mean_work(self) -> float:
        return self._waiting.work / max(1, self._waiting.num_sequences)

    def _retry_headers(self, wait_s: float) -> dict[str, str]:
        """Whole seconds, as is standard, and milliseconds, which OpenAI's clients prefer."""
        longest_s = _MAX_RETRY_S / (1 + _JITTER)
        wait_s = min(max(wait_s, _MIN_RETRY_S), longest_s) * (1 + _JITTER * self._jitter())
        return {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(int(wait_s * 1e3))}

    def _enter(self, client: str, request: EngineRequest) -> None:
        num_tokens = len(request.prompt_token_ids)
        output = min(self._mean_output, request.max_total_len - num_tokens)
        sequence = _Sequence(client, num_tokens, num_tokens + output)
        self._sequences[request.request_id] = sequence
        self._waiting.add(sequence)
        self._by_client.setdefault(client, _Load()).add(sequence)

    # -- and go

    def on_step(self, outputs: StepOutputs) -> None:
        """The engine listener."""
        stats = outputs.stats
        if stats.num_batched_tokens:
            now_s = self._clock()
            idle = self._last_step_s is None
            seconds = stats.step_s if idle else now_s - (self._last_step_s or 0.0)
            self._rate.add(stats.num_batched_tokens + stats.num_prefix_hits, seconds)
            self._last_step_s = now_s
        if not stats.num_running:  # idle, or between two engines: time that is nobody's
            self._last_step_s = None
        self._cache_is_full = stats.kv_usage > _FULL_CACHE
        for started in outputs.started:
            self._start(started.request_id)
        for finish in outputs.finished:
            self._remove(finish.request_id)

    def leave(self, request: EngineRequest, num_output_tokens: int) -> None:
        """A sequence will not be read any more; however it ended, it is not waiting."""
        self._remove(request.request_id)
        if not num_output_tokens:
            return
        num_tokens = len(request.prompt_token_ids) + num_output_tokens
        _count(self.num_tokens_by_client, request.client, num_tokens)
        self._num_finished += 1
        weight = 1 / min(self._num_finished + 1, _OUTPUT_MEMORY)
        self._mean_output += (num_output_tokens - self._mean_output) * weight

    def _start(self, request_id: int) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None or not sequence.waits:
            return
        sequence.waits = False
        self._waiting.add(sequence, -1)
        load = self._by_client[sequence.client]
        load.add(sequence, -1)
        if not load.num_sequences:
            del self._by_client[sequence.client]

    def _remove(self, request_id: int) -> None:
        self._start(request_id)
        self._sequences.pop(request_id, None)


def _limit(wanted: int | None, default: int) -> int:
    """0: none."""
    return default if wanted is None else wanted


def _count(counter: Counter[str], client: str, amount: int) -> None:
    known = client in counter or len(counter) < _MAX_NAMES
    counter[client if known else _OTHERS] += amount
