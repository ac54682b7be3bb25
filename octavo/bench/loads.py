"""`Load`: the requests of a run, from a named workload, a file, or of one random size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.bench.workloads import (
    BenchRequest,
    make_random,
    make_workload,
    scale_ids,
)
from octavo.errors import ConfigError

_KEYS = {"prompt_token_ids", "max_tokens"}


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    make: Callable[[int], list[BenchRequest]]  # the requests of repeat 0, 1, ...
    is_random: bool  # the ids mean nothing: they may be scaled, and drawn anew for each repeat

    def requests(self, repeat: int = 0, vocab_size: int | None = None) -> list[BenchRequest]:
        """The requests of one repeat, random ids scaled into the vocabulary (see `scale_ids`)."""
        requests = self.make(repeat)
        if vocab_size is None or not self.is_random:
            return requests
        return [scale_ids(request, vocab_size) for request in requests]

    def take(self, num_requests: int | None) -> list[BenchRequest]:
        """The first so many requests; a workload goes on with those of further repeats.

        Raises:
            ConfigError: a file has fewer.
        """
        if num_requests is None:
            return self.make(0)
        if self.is_random:
            endless = itertools.chain.from_iterable(map(self.make, itertools.count()))
            return list(itertools.islice(endless, num_requests))
        requests = self.make(0)
        if num_requests > len(requests):
            raise ConfigError(f"{self.name} has {len(requests)} requests, not {num_requests}.")
        return requests[:num_requests]


def workload(name: str) -> Load:
    """One of `workloads.WORKLOADS`."""
    return Load(name, lambda repeat: make_workload(name, repeat), is_random=True)


def from_file(path: Path) -> Load:
    """A JSONL file of {"prompt_token_ids": [...], "max_tokens": n}, read now. Its ids are taken as
    they are, the same for each repeat.

    Raises:
        ConfigError: the file cannot be read, or a line is malformed (with its number).
    """
    requests = read_requests(path)
    return Load(path.name, lambda repeat: requests, is_random=False)


def random_sizes(input_len: int, output_len: int, num_requests: int, seed: int) -> Load:
    """Random prompts of `input_len` tokens, each to be answered with `output_len`."""
    for name, value in (("input-len", input_len), ("output-len", output_len)):
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}.")

    def make(repeat: int) -> list[BenchRequest]:
        return make_random(input_len, output_len, num_requests, seed + repeat)

    return Load(f"random {input_len}+{output_len}", make, is_random=True)


def read_requests(path: Path) -> list[BenchRequest]:
    """Raises ConfigError, with the line number for a malformed line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the requests file {path}: {error}") from error
    if not lines:
        raise ConfigError(f"{path} is empty: it needs one JSON object per line.")
    return [_parse(line, f"{path} line {i}") for i, line in enumerate(lines, 1)]


def _parse(line: str, where: str) -> BenchRequest:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict) or set(value) != _KEYS:
        raise ConfigError(f"{where} must be an object with exactly {' and '.join(sorted(_KEYS))}.")
    ids, max_tokens = value["prompt_token_ids"], value["max_tokens"]
    if not isinstance(ids, list) or not ids or not all(_is_count(i, 0) for i in ids):
        raise ConfigError(f"{where}: prompt_token_ids must be a non-empty list of token ids.")
    if not _is_count(max_tokens, 1):
        raise ConfigError(f"{where}: max_tokens must be an integer of at least 1.")
    return BenchRequest(tuple(ids), max_tokens)


def _is_count(value: Any, low: int) -> bool:
    return type(value) is int and low <= value < 2**31
