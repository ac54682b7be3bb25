"""`ModelRunner`: owns the device. Carries out plans; decides nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from octavo.attention import get_backend
from octavo.attention.base import AttentionBatch, KVLayer
from octavo.attention.context import ForwardContext
from octavo.config import EngineConfig
from octavo.models import create_model
from octavo.platforms import Platform
from octavo.runner import memory, prompt_logprobs
from octavo.runner.graphs import DecodeGraphs
from octavo.runner.inputs import build_inputs
from octavo.runner.kv import allocate_kv, block_bytes
from octavo.runner.prompt_logprobs import PromptLogprobs
from octavo.runner.rows import DeviceRows, to_device
from octavo.runner.sampler import SampledLogprobs, Sampler
from octavo.sched.plan import StepPlan, StepResult
from octavo.weights.loader import load_weights

# Captured before the first request; the other sizes follow while the engine is idle or on demand.
_FIRST_GRAPHS = (1, 2, 4, 8)


@dataclass(slots=True)
class PendingStep:
    """A step that was handed to the device. `wait` may be called once."""

    _token_ids: torch.Tensor  # [num_samples] int64, on its way to the host
    _logprobs: SampledLogprobs | None
    _prompt_logprobs: dict[int, list[SampledLogprobs]]
    _done: torch.cuda.Event | None = None

    def wait(self) -> StepResult:
        """Block until the step has run."""
        if self._done is not None:
            self._done.synchronize()
        return StepResult(
            token_ids=self._token_ids.numpy().astype(np.int32),
            logprobs=self._logprobs.to_host() if self._logprobs is not None else {},
            prompt_logprobs=prompt_logprobs.to_host(self._prompt_logprobs),
        )


@dataclass(slots=True)
class StartupReport:
    """What start-up took and what it left."""

    seconds: dict[str, float] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start_s


class ModelRunner:
    """Weights, KV tensors and device rows of one model on one device."""

    def __init__(self, config: EngineConfig, platform: Platform, *, progress: bool = False) -> None:
        """Load the model and size the cache; afterwards `num_blocks` says how large it is.

        Raises:
            CheckpointError, UnsupportedModelError: the model cannot be loaded.
            ConfigError: the KV cache would have no room.
        """
        self._config = config
        self._platform = platform
        self._device = platform.torch_device
        self._dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._graphs: DecodeGraphs | None = None
        self._kv: tuple[KVLayer, ...] = ()
        self.report = StartupReport()
        if config.runner.num_threads and self._device.type == "cpu":
            torch.set_num_threads(config.runner.num_threads)
        with torch.inference_mode():
            with self.report.phase("load"):
                self._load(progress)
            self._make_rows()
            with self.report.phase("warm_up"):
                reserve_bytes = self._warm_up()
            with self.report.phase("cache"):
                self._make_cache(reserve_bytes)
            with self.report.phase("graphs"):
                self._make_graphs()
        self.report.memory_bytes["free"] = platform.memory_free_bytes()

    # -- start-up

    def _load(self, progress: bool) -> None:
        model = self._config.model
        used = self._platform.memory_used_bytes()
        with torch.device(self._device), _default_dtype(self._dtype):
            self._model = create_model(model.hf_config, model.max_model_len)
        self._model.eval().requires_grad_(False)
        load_weights(self._model, model, progress=progress)
        self._backend = get_backend(self._config.runner.attention_backend)
        self._platform.synchronize()
        self.report.memory_bytes["weights"] = max(0, self._platform.memory_used_bytes() - used)

    def _make_rows(self) -> None:
        runner = self._config.runner
        max_blocks = -(-runner.max_model_len // self._config.cache.block_size)
        self._rows = DeviceRows(runner.max_num_seqs, max_blocks, self._device)
        self._sampler = Sampler(runner.max_num_seqs, self._config.model.vocab_size, self._device)
        self._prompt_logprobs = PromptLogprobs(self._device)

    def _warm_up(self) -> int:
        """Run the largest step on a cache of one block, and return what it needs besides
        weights.
        """
        if self._device.type == "cpu":
            return 0
        self._allocate(1)
        used = self._platform.memory_used_bytes()
        runner = self._config.runner
        chunk_len = min(runner.max_num_batched_tokens, runner.max_model_len)
        num_rows = min(runner.max_num_seqs, runner.max_num_batched_tokens // chunk_len)
        self._run(_warm_up_plan(num_rows, chunk_len)).wait()
        self._run(_warm_up_plan(runner.max_num_seqs, 1)).wait()
        if self._uses_graphs:
            graphs = self._new_graphs()
            graphs.capture_next((runner.max_num_seqs,))
            del graphs
        self._platform.synchronize()
        reserve_bytes = max(0, self._platform.memory_peak_bytes() - used)
        self.report.memory_bytes["workspace"] = reserve_bytes
        self._kv = ()
        torch.cuda.empty_cache()
        return reserve_bytes

    def _make_cache(self, reserve_bytes: int) -> None:
        cache = self._config.cache
        num_bytes = block_bytes(self._model.attention_specs, cache.block_size, self._dtype)
        budget = memory.kv_budget_bytes(cache, self._platform, reserve_bytes)
        wanted = memory.count_blocks(cache, budget, num_bytes)
        self.num_blocks = memory.shrink_until_it_fits(wanted, self._allocate)
        self.report.memory_bytes["kv"] = self.num_blocks * num_bytes

    def _allocate(self, num_blocks: int) -> None:
        specs, block_size = self._model.attention_specs, self._config.cache.block_size
        self._kv = ()
        self._kv = allocate_kv(specs, num_blocks, block_size, self._dtype, self._device)

    @property
    def _uses_graphs(self) -> bool:
        return not self._config.runner.enforce_eager and self._backend.supports_graphs

    def _make_graphs(self) -> None:
        if not self._uses_graphs:
            return
        used = self._platform.memory_used_bytes()
        self._graphs = self._new_graphs()
        while self._graphs.capture_next(_FIRST_GRAPHS):
            pass
        self._platform.synchronize()
        self.report.memory_bytes["graphs"] = self._platform.memory_used_bytes() - used

    def _new_graphs(self) -> DecodeGraphs:
        return DecodeGraphs(
            self._rows,
            self._config.cache.block_size,
            self._config.runner.max_model_len,
            self._forward,
            self._model.compute_logits,
        )

    # -- steps

    def submit(self, plan: StepPlan) -> PendingStep:
        """Queue a step on the device; on a CPU it runs here and now."""
        with torch.inference_mode():
            self._update_rows(plan)
            if self._graphs is not None and plan.num_decodes == len(plan.rows):
                return self._replay(self._graphs, plan)
            return self._run(plan)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run a step and wait for it."""
        return self.submit(plan).wait()

    def prepare_more(self) -> bool:
        """Use an idle moment: capture one more graph. False when there is nothing left to do."""
        with torch.inference_mode():
            return self._graphs is not None and self._graphs.capture_next()

    def _update_rows(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            self._sampler.free(row)
            self._prompt_logprobs.free(row)
        for admission in plan.admitted:
            self._sampler.admit(admission)
            self._prompt_logprobs.admit(admission)
        self._rows.update(plan)

    def _forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch
    ) -> torch.Tensor:
        context = ForwardContext(batch, self._kv, self._backend)
        hidden: torch.Tensor = self._model(token_ids, positions, context)
        return hidden

    def _replay(self, graphs: DecodeGraphs, plan: StepPlan) -> PendingStep:
        """A step in which every row decodes one token."""
        greedy = self._sampler.is_plain_greedy(plan.rows)
        step = graphs.replay(plan.rows, greedy=greedy)
        if step.token_ids is not None:
            return self._pending(step.token_ids, None, {})
        assert step.logits is not None
        token_ids, logprobs = self._sampler.sample(
            step.logits, plan.rows, plan.starts + plan.chunk_lens
        )
        self._rows.last_token_ids[to_device(plan.rows.astype(np.int64), self._device)] = token_ids
        return self._pending(token_ids, logprobs, {})

    def _run(self, plan: StepPlan) -> PendingStep:
        """Any step, operation by operation."""
        inputs = build_inputs(plan, self._rows, self._config.cache.block_size)
        hidden = self._forward(inputs.token_ids, inputs.positions, inputs.batch)
        self._rows.num_computed[inputs.seq_rows] = inputs.seq_lens
        prompt_results = self._prompt_logprobs.compute(plan, hidden, self._model.compute_logits)
        sampled_rows = plan.rows[plan.samples]
        if not len(sampled_rows):
            return PendingStep(torch.empty(0, dtype=torch.int64), None, prompt_results)
        logits = self._model.compute_logits(hidden[inputs.sample_indices])
        positions = (plan.starts + plan.chunk_lens)[plan.samples]
        token_ids, logprobs = self._sampler.sample(logits, sampled_rows, positions)
        self._rows.last_token_ids[inputs.sample_rows] = token_ids
        return self._pending(token_ids, logprobs, prompt_results)

    def _pending(
        self,
        token_ids: torch.Tensor,
        logprobs: SampledLogprobs | None,
        prompt_results: dict[int, list[SampledLogprobs]],
    ) -> PendingStep:
        if self._device.type == "cpu":
            return PendingStep(token_ids, logprobs, prompt_results)
        host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
        host.copy_(token_ids, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return PendingStep(host, logprobs, prompt_results, done)


def _warm_up_plan(num_rows: int, chunk_len: int) -> StepPlan:
    """`num_rows` chunks that all write to block 0."""
    return StepPlan(
        step=-1,
        rows=np.arange(num_rows, dtype=np.int32),
        starts=np.zeros(num_rows, np.int32),
        chunk_lens=np.full(num_rows, chunk_len, np.int32),
        samples=np.ones(num_rows, np.bool_),
        num_decodes=0,
        token_ids=np.zeros(num_rows * chunk_len, np.int32),
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
