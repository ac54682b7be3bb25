"""`ModelRunner`: owns the device. Carries out plans; decides nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from octavo.attention import get_backend
from octavo.attention.context import ForwardContext
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.log import get_logger
from octavo.models import create_model
from octavo.platforms import Platform
from octavo.runner import prompt_logprobs
from octavo.runner.inputs import build_inputs
from octavo.runner.kv import allocate_kv, block_bytes
from octavo.runner.prompt_logprobs import PromptLogprobs
from octavo.runner.rows import DeviceRows
from octavo.runner.sampler import SampledLogprobs, Sampler
from octavo.sched.plan import StepPlan, StepResult
from octavo.weights.loader import load_weights

logger = get_logger(__name__)

# On a CPU the cache shares memory with everything else that a person runs.
_CPU_KV_BYTES = 4 << 30
_CPU_KV_SHARE = 0.5  # of the free memory, at most


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
        self.report = StartupReport()
        if config.runner.num_threads and self._device.type == "cpu":
            torch.set_num_threads(config.runner.num_threads)
        with self.report.phase("load"):
            self._load(progress)
        with self.report.phase("cache"):
            self._make_cache()

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

    def _make_cache(self) -> None:
        cache, runner = self._config.cache, self._config.runner
        specs = self._model.attention_specs
        num_bytes = block_bytes(specs, cache.block_size, self._dtype)
        self.num_blocks = self._count_blocks(num_bytes)
        self._kv = allocate_kv(specs, self.num_blocks, cache.block_size, self._dtype, self._device)
        max_blocks = -(-runner.max_model_len // cache.block_size)
        self._rows = DeviceRows(runner.max_num_seqs, max_blocks, self._device)
        self._sampler = Sampler(runner.max_num_seqs, self._config.model.vocab_size, self._device)
        self._prompt_logprobs = PromptLogprobs(self._device)
        self.report.memory_bytes["kv"] = self.num_blocks * num_bytes
        self.report.memory_bytes["free"] = self._platform.memory_free_bytes()

    def _count_blocks(self, num_bytes: int) -> int:
        """Blocks of `num_bytes` each; block 0, which is padding, included."""
        cache = self._config.cache
        if cache.num_blocks_override is not None:
            return cache.num_blocks_override + 1
        budget = cache.kv_cache_memory_bytes
        if budget is None:
            free = self._platform.memory_free_bytes()
            if self._device.type == "cpu":
                budget = min(_CPU_KV_BYTES, int(free * _CPU_KV_SHARE))
            else:
                total = self._platform.info().total_memory_bytes
                budget = free - int(total * (1.0 - cache.gpu_memory_utilization))
        if budget < 2 * num_bytes:
            raise ConfigError(
                f"The KV cache would have {max(budget, 0):,} bytes, and one block of "
                f"{cache.block_size} tokens takes {num_bytes:,}. Raise gpu_memory_utilization or "
                "kv_cache_memory_bytes, or use a smaller model or dtype."
            )
        return budget // num_bytes

    def submit(self, plan: StepPlan) -> PendingStep:
        """Queue a step on the device; on a CPU it runs here and now."""
        with torch.inference_mode():
            self._update_rows(plan)
            inputs = build_inputs(plan, self._rows, self._config.cache.block_size)
            context = ForwardContext(inputs.batch, self._kv, self._backend)
            hidden = self._model(inputs.token_ids, inputs.positions, context)
            prompt_results = self._prompt_logprobs.compute(plan, hidden, self._model.compute_logits)
            sampled_rows = plan.rows[plan.samples]
            if not len(sampled_rows):
                return PendingStep(torch.empty(0, dtype=torch.int64), None, prompt_results)
            logits = self._model.compute_logits(hidden[inputs.sample_indices])
            positions = (plan.starts + plan.chunk_lens)[plan.samples]
            token_ids, logprobs = self._sampler.sample(logits, sampled_rows, positions)
            self._rows.last_token_ids[inputs.sample_rows] = token_ids
            return self._pending(token_ids, logprobs, prompt_results)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run a step and wait for it."""
        return self.submit(plan).wait()

    def _update_rows(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            self._sampler.free(row)
            self._prompt_logprobs.free(row)
        for admission in plan.admitted:
            self._sampler.admit(admission)
            self._prompt_logprobs.admit(admission)
        self._rows.update(plan)

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


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
