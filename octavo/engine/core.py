"""`EngineCore`: scheduler and runner, joined by the step function. The offline `LLM` drives it in
process, the server's engine process drives it behind a socket.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.kvcache import KVCache
from octavo.log import get_logger
from octavo.sched.plan import RowSnapshot, StepPlan, StepResult
from octavo.sched.scheduler import Scheduler
from octavo.types import EngineInfo, EngineRequest, StepOutputs, StepStats

logger = get_logger(__name__)


class Pending(Protocol):
    """A step on its way."""

    def wait(self) -> StepResult: ...


class Report(Protocol):
    """What a runner says of its start-up."""

    @property
    def seconds(self) -> dict[str, float]: ...
    @property
    def memory_bytes(self) -> dict[str, int]: ...


class Runner(Protocol):
    """The execute tower, as the step function sees it."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def report(self) -> Report: ...
    def submit(self, plan: StepPlan) -> Pending: ...
    def prepare_more(self) -> bool: ...
    def close(self) -> None: ...


class _Step(NamedTuple):
    plan: StepPlan
    pending: Pending
    submit_s: float  # time.monotonic()


class EngineCore:
    """The step loop's state: one scheduler, one runner, the steps in flight."""

    def __init__(self, config: EngineConfig, runner: Runner) -> None:
        """Raises ConfigError if the cache cannot hold the context that was asked for."""
        self._runner = runner
        cache = KVCache(
            runner.num_blocks,
            config.cache.block_size,
            enable_prefix_caching=config.cache.enable_prefix_caching,
        )
        max_model_len = _fit_context(config, cache.num_usable_blocks * config.cache.block_size)
        self._scheduler = Scheduler(
            dataclasses.replace(config.scheduler, max_model_len=max_model_len), cache
        )
        self._depth = config.scheduler.async_depth
        self._in_flight: deque[_Step] = deque()
        self._last_apply_s = time.monotonic()
        self.info = _describe(config, runner, max_model_len)

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.num_live or self._in_flight)

    def add(self, request: EngineRequest) -> None:
        """Accept a request that `text.prepare` has checked; exactly one `Finish` will follow."""
        self._scheduler.add(request)

    def abort(self, request_ids: Iterable[int]) -> StepOutputs:
        """End requests now; what is left shows in the gauges."""
        return StepOutputs(finished=self._scheduler.abort(request_ids), stats=self.stats)

    @property
    def stats(self) -> StepStats:
        """The gauges between two steps."""
        return self._scheduler.gauges()

    def step(self) -> StepOutputs | None:
        """Plan one step and hand it to the device; take in the oldest step if enough are in flight.

        None if this call brought no outputs.
        """
        plan = self._scheduler.schedule()
        if plan is not None:
            self._submit(plan)
        if not self._in_flight or (plan is not None and len(self._in_flight) <= self._depth):
            return self._scheduler.take_expired()
        oldest = self._in_flight.popleft()
        with self._dropped_if_it_fails(oldest.plan):
            result = oldest.pending.wait()
        now_s = time.monotonic()
        # Steps in flight overlap: each counts from when the one before it was done.
        step_s = now_s - max(self._last_apply_s, oldest.submit_s)
        self._last_apply_s = now_s
        return self._scheduler.apply(oldest.plan, result, step_s)

    def _submit(self, plan: StepPlan) -> None:
        submit_s = time.monotonic()
        with self._dropped_if_it_fails(plan):
            self._in_flight.append(_Step(plan, self._runner.submit(plan), submit_s))

    @contextmanager
    def _dropped_if_it_fails(self, plan: StepPlan) -> Iterator[None]:
        """A step that did not run to its end (Ctrl-C, a device error) must leave no trace: what it
        would have written to the cache is published already.
        """
        try:
            yield
        except BaseException:
            self._scheduler.drop(plan)
            raise

    @property
    def plans_in_flight(self) -> list[StepPlan]:
        return [step.plan for step in self._in_flight]

    def snapshot(self) -> list[RowSnapshot]:
        """The rows as they were before the plans in flight."""
        return self._scheduler.snapshot(self.plans_in_flight)

    def prepare_more(self) -> bool:
        """Spend an idle moment on preparing the device; False when nothing is left to prepare."""
        return self._runner.prepare_more()

    def close(self) -> None:
        """Free the device. The engine cannot be used afterwards."""
        self._in_flight.clear()
        self._runner.close()

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()


def _fit_context(config: EngineConfig, capacity: int) -> int:
    """The context length that one request can really have."""
    wanted = config.model.max_model_len
    if wanted <= capacity:
        return wanted
    if config.cache.require_full_context:
        raise ConfigError(
            f"max_model_len is {wanted} tokens, but the KV cache has room for {capacity}. Lower "
            "max_model_len, or raise kv_cache_memory_bytes or gpu_memory_utilization."
        )
    logger.warning("context limited to %d of %d tokens: the KV cache's size", capacity, wanted)
    return capacity


def _describe(config: EngineConfig, runner: Runner, max_model_len: int) -> EngineInfo:
    model, scheduler = config.model, config.scheduler
    num_blocks = runner.num_blocks - 1
    return EngineInfo(
        model=model.model,
        architecture=model.architecture,
        dtype=model.dtype,
        device=config.runner.device,
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        kv_cache_dtype=config.cache.dtype,
        block_size=config.cache.block_size,
        num_blocks=num_blocks,
        kv_capacity_tokens=num_blocks * config.cache.block_size,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        enable_prefix_caching=scheduler.enable_prefix_caching,
        scheduling_policy=scheduler.policy,
        startup_s=dict(runner.report.seconds),
        memory_bytes=dict(runner.report.memory_bytes),
    )
