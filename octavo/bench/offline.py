"""`octavo bench offline`: the engine's own speed, in this process.

Token ids in, token ids out: greedy, EOS ignored, nothing detokenised, all requests handed over at
once. `EngineCore` is driven directly, so that nothing but the engine is measured.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from octavo import __version__
from octavo.bench.loads import Load
from octavo.bench.report import Facts, Figures, OfflineReport, Timing
from octavo.bench.workloads import BenchRequest, random_ids, scale_ids
from octavo.checkpoint import locate_from
from octavo.config import EngineArgs
from octavo.engine.build import build_core
from octavo.engine.core import EngineCore
from octavo.errors import ConfigError, EngineError, InvalidRequestError
from octavo.platforms import detect
from octavo.text.prepare import Limits, prepare_requests
from octavo.types import EngineRequest, SamplingParams, StepOutputs

_LOADED_S = time.monotonic()
_REQUEST_IDS = itertools.count(1)  # unique for the life of the engine, whatever is measured

# The warm-up: the load's first requests, shortened, with ids of their own.
_WARMUP_REQUESTS = 16
_WARMUP_PROMPT_LEN = 512
_WARMUP_OUTPUT_LEN = 16
_WARMUP_SEED = 977


class OfflineEngine:
    """An engine in this process, and what was measured of its start."""

    def __init__(self, args: EngineArgs) -> None:
        """Raises OctavoError if the engine cannot start."""
        self._args = args
        checkpoint = locate_from(args)
        self.core = build_core(args, checkpoint, progress=True)
        self.startup_s = seconds_since_process_start()

    def measure(self, load: Load, *, warmup: bool = True, num_repeats: int = 1) -> OfflineReport:
        """Run the load `num_repeats` times, with fresh prompts each time.

        Raises:
            ConfigError: a request does not fit the engine (which and why), or an option is off.
            EngineError: the engine failed.
        """
        if num_repeats < 1:
            raise ConfigError(f"--repeat must be at least 1, not {num_repeats}.")
        rounds = _Rounds(self.core, load)
        first = rounds.prepare(0)  # a load that does not fit fails here, before any work
        if warmup:
            rounds.run(rounds.prepare_warmup(), "warm-up")
        repeats = []
        for repeat in range(num_repeats):
            title = load.name if num_repeats == 1 else f"{load.name} {repeat + 1}/{num_repeats}"
            repeats.append(rounds.run(rounds.prepare(repeat) if repeat else first, title))
        return OfflineReport(facts=self._facts(load), repeats=tuple(repeats))

    def _facts(self, load: Load) -> Facts:
        platform, info = detect(self._args.device), self.core.info
        return Facts(
            workload=load.name,
            model=info.model,
            octavo_version=__version__,
            device=info.device,
            device_name=platform.info().name,
            dtype=info.dtype,
            startup_s=round(self.startup_s, 3),
            peak_memory_bytes=platform.memory_peak_bytes(),
            kv_capacity_tokens=info.kv_capacity_tokens,
        )


def run_offline(
    args: EngineArgs, load: Load, *, warmup: bool = True, num_repeats: int = 1
) -> OfflineReport:
    """Start an engine and measure one load; see `OfflineEngine.measure`."""
    return OfflineEngine(args).measure(load, warmup=warmup, num_repeats=num_repeats)


def seconds_since_process_start() -> float:
    """As Linux counts it, in steps of 10 ms; elsewhere, since this module was imported."""
    try:
        # After the command's name, which may hold anything: field 3 and on; 22 is the start.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic() - _LOADED_S
    start_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_s


@dataclass(slots=True)
class _Trace:
    """What came out of the engine, step by step: cheap to keep while the clock runs."""

    steps: list[tuple[float, list[int]]] = field(default_factory=list)  # when, request ids
    num_cached: dict[int, int] = field(default_factory=dict)

    def take(self, now_s: float, outputs: StepOutputs) -> None:
        self.steps.append((now_s, outputs.request_ids))
        for started in outputs.started:
            self.num_cached[started.request_id] = started.num_cached_tokens
        for finish in outputs.finished:
            if finish.reason != "length":
                raise EngineError(f"A request ended with {finish.reason}: {finish.message}")


class _Rounds:
    """Runs sets of requests, one after the other, on one engine."""

    def __init__(self, core: EngineCore, load: Load) -> None:
        self._core = core
        self._load = load
        self._ids = _REQUEST_IDS

    def prepare(self, repeat: int) -> list[EngineRequest]:
        """The load's requests for one repeat. Raises ConfigError for one that does not fit.

        A file has the same prompts in each repeat; the salt keeps them from finding the last one's
        cache.
        """
        requests = self._load.requests(repeat, self._core.info.vocab_size)
        return self._prepare(requests, cache_salt=f"repeat {repeat}")

    def prepare_warmup(self) -> list[EngineRequest]:
        """Few, short and different requests of the load's shape, to touch every code path once."""
        rng = random.Random(_WARMUP_SEED)
        shortened = []
        for request in self._load.requests()[:_WARMUP_REQUESTS]:
            prompt_len = min(len(request.prompt_token_ids), _WARMUP_PROMPT_LEN)
            output_len = min(request.max_tokens, _WARMUP_OUTPUT_LEN)
            fresh = BenchRequest(random_ids(rng, prompt_len), output_len)
            shortened.append(scale_ids(fresh, self._core.info.vocab_size))
        return self._prepare(shortened, cache_salt="warm-up")

    def run(self, prepared: Sequence[EngineRequest], title: str) -> Figures:
        trace, core = _Trace(), self._core
        num_tokens = sum(request.params.max_tokens or 0 for request in prepared)
        with tqdm(total=num_tokens, desc=title, unit="tok", disable=None, leave=False) as bar:
            start_s = time.perf_counter()
            for request in prepared:
                core.add(request)
            while core.has_work:
                if (outputs := core.step()) is not None:
                    trace.take(time.perf_counter(), outputs)
                    bar.update(len(outputs.request_ids))
        timings = _timings(prepared, trace, start_s)
        return Figures.of(timings, max(timing.last_token_s for timing in timings))

    def _prepare(self, requests: Sequence[BenchRequest], cache_salt: str) -> list[EngineRequest]:
        limits = Limits.from_info(self._core.info)
        prepared = []
        for number, request in enumerate(requests, 1):
            params = SamplingParams(
                temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True, detokenize=False
            )
            try:
                prepared += prepare_requests(
                    request.prompt_token_ids,
                    params,
                    limits,
                    None,
                    next_id=self._ids.__next__,
                    default_seed=0,
                    cache_salt=cache_salt,
                    arrival_s=time.monotonic(),
                )
            except InvalidRequestError as error:
                raise ConfigError(f"Request {number} of {self._load.name}: {error}") from error
        return prepared


def _timings(prepared: Sequence[EngineRequest], trace: _Trace, start_s: float) -> list[Timing]:
    """Raises EngineError if a request did not get exactly the tokens that it asked for."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    counts = dict.fromkeys((request.request_id for request in prepared), 0)
    for now_s, request_ids in trace.steps:
        for request_id in request_ids:
            first.setdefault(request_id, now_s)
            last[request_id] = now_s
            counts[request_id] += 1
    for request in prepared:
        if counts[request.request_id] != request.params.max_tokens:
            raise EngineError(
                f"The engine gave {counts[request.request_id]} tokens to a request for "
                f"{request.params.max_tokens}."
            )
    return [
        Timing(
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=counts[request.request_id],
            num_cached_tokens=trace.num_cached[request.request_id],
            start_s=0.0,
            first_token_s=first[request.request_id] - start_s,
            last_token_s=last[request.request_id] - start_s,
        )
        for request in prepared
    ]
