"""Named workloads of seeded token ids: the same numbers on every machine and for every engine.

The order of the random calls is part of the definition: a change here makes new figures
incomparable with old ones, and the checksums in the tests fail.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

LOW_ID, HIGH_ID = 100, 150_000  # both drawn; fits vocabularies of 150,001 tokens and more
_REPEAT_STRIDE = 1000  # seeds of repeat r: the workload's own + r times this


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One prompt, and how many tokens to generate from it: no fewer, as EOS is ignored."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int

    @property
    def total_len(self) -> int:
        return len(self.prompt_token_ids) + self.max_tokens


def random_ids(rng: random.Random, num_ids: int) -> tuple[int, ...]:
    return tuple(rng.randint(LOW_ID, HIGH_ID) for _ in range(num_ids))


def scale_ids(request: BenchRequest, vocab_size: int) -> BenchRequest:
    """The request with ids from 0..HIGH_ID mapped onto 0..vocab_size-1, in proportion:
    `id * vocab_size // (HIGH_ID + 1)`. A vocabulary that holds HIGH_ID leaves it as it is.
    """
    if vocab_size > HIGH_ID:
        return request
    ids = tuple(i * vocab_size // (HIGH_ID + 1) for i in request.prompt_token_ids)
    return BenchRequest(ids, request.max_tokens)


def _single(rng: random.Random) -> list[BenchRequest]:
    """One request alone: latency."""
    return [BenchRequest(random_ids(rng, 512), 512)]


def _mixed256(rng: random.Random) -> list[BenchRequest]:
    """256 prompts and outputs of 100 to 1,024 tokens: throughput."""
    requests = []
    for _ in range(256):
        prompt = random_ids(rng, rng.randint(100, 1024))
        requests.append(BenchRequest(prompt, rng.randint(100, 1024)))
    return requests


def _prefill(rng: random.Random) -> list[BenchRequest]:
    """64 prompts of 2,048 tokens and one output token each."""
    return [BenchRequest(random_ids(rng, 2048), 1) for _ in range(64)]


def _shared_prefix(rng: random.Random) -> list[BenchRequest]:
    """256 prompts that begin with the same 2,048 tokens: the prefix cache."""
    head = random_ids(rng, 2048)
    return [BenchRequest(head + random_ids(rng, 128), 128) for _ in range(256)]


def _chat1000(rng: random.Random) -> list[BenchRequest]:
    """1,000 requests whose lengths are spread as in conversations (log-normal)."""
    requests = []
    for _ in range(1000):
        prompt = random_ids(rng, _clip(rng.lognormvariate(5.0, 1.1), 2000))
        requests.append(BenchRequest(prompt, _clip(rng.lognormvariate(5.1, 0.9), 1500)))
    return requests


def _long_decode(rng: random.Random) -> list[BenchRequest]:
    """16 sequences at 16k context: attention over the cache dominates."""
    return [BenchRequest(random_ids(rng, 16384), 128) for _ in range(16)]


def _clip(value: float, high: int) -> int:
    return max(4, min(high, int(value)))


# By name: the maker and its seed.
WORKLOADS: dict[str, tuple[Callable[[random.Random], list[BenchRequest]], int]] = {
    "single": (_single, 1),
    "mixed256": (_mixed256, 0),
    "prefill": (_prefill, 2),
    "shared_prefix": (_shared_prefix, 3),
    "chat1000": (_chat1000, 4),
    "long_decode": (_long_decode, 5),
}


def make_workload(name: str, repeat: int = 0) -> list[BenchRequest]:
    """The requests of a workload, always the same; each `repeat` has others of the same kind.

    KeyError for a name that is not in WORKLOADS.
    """
    make, seed = WORKLOADS[name]
    return make(random.Random(seed + repeat * _REPEAT_STRIDE))


def make_random(
    input_len: int, output_len: int, num_requests: int, seed: int
) -> list[BenchRequest]:
    """Requests of one size, in tokens."""
    rng = random.Random(seed)
    return [BenchRequest(random_ids(rng, input_len), output_len) for _ in range(num_requests)]
