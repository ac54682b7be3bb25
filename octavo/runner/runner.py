"""`ModelRunner`: owns the device. Carries out plans; decides nothing."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, product

import numpy as np
import torch

from octavo.attention import get_backend
from octavo.attention.base import AttentionBatch, KVLayer, PreparedAttention
from octavo.attention.context import ForwardContext
from octavo.config import EngineConfig
from octavo.kernels import launch
from octavo.kernels.argmax import argmax
from octavo.kernels.cpu import library
from octavo.kernels.cpu.ops import in_charge
from octavo.layers.embedding import Embedding
from octavo.layers.host import plan_embedding_on_host, settle_on_host
from octavo.log import get_logger
from octavo.models import create_model
from octavo.platforms import Platform
from octavo.platforms.cpu import CpuPlatform
from octavo.quant import quantize, stack_layers
from octavo.runner import memory, prompt_logprobs
from octavo.runner.chunk_graphs import ChunkGraphs, StepSize
from octavo.runner.graphs import Capturer, DecodeGraphs, GraphStep, StepModel
from octavo.runner.inputs import MAX_GATHERED, build_inputs, count_gathered
from octavo.runner.kv import allocate_kv, block_bytes
from octavo.runner.prefixes import MIN_MEMBERS, PrefixFinder
from octavo.runner.prompt_logprobs import PromptLogprobs
from octavo.runner.report import StartupReport
from octavo.runner.rows import DeviceRows, to_device, to_host
from octavo.runner.sampler import SampledLogprobs, Sampler
from octavo.sched.plan import StepPlan, StepResult
from octavo.weights.loader import load_weights
from octavo.weights.packed import PackedModel

logger = get_logger(__name__)

# Captured before the first request; the other sizes follow while the engine is idle or on demand.
_FIRST_DECODES = (1, 4)  # rows
_FIRST_CHUNKS = (64, 512)  # tokens, of up to 4 sequences
# Decode sizes between which kernels differ: how contexts are cut, and how small products are made.
# Besides, the largest.
COMPILED_DECODES = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512)
_COMPILED_SHARED = (MIN_MEMBERS, 128)
# Graphs keep their activations: those of a chunk may take so much, by its widest layer.
_CHUNK_GRAPH_BYTES = 128 << 20
# Rows whose logits exist at once: 256 x 152k x (2 + 4) bytes = 233 MB.
_LOGITS_PIECE = 256


@dataclass(slots=True)
class PendingStep:
    """A step that was handed to the device. `wait` may be called once."""

    _token_ids: torch.Tensor  # [num_samples] int64, on its way to the host
    _logprobs: list[SampledLogprobs]
    _prompt_logprobs: dict[int, list[SampledLogprobs]]
    _done: torch.cuda.Event | None = None

    def wait(self) -> StepResult:
        """Block until the step has run."""
        if self._done is not None:
            self._done.synchronize()
        return StepResult(
            token_ids=self._token_ids.numpy().astype(np.int32),
            logprobs={r: lp for piece in self._logprobs for r, lp in piece.to_host().items()},
            prompt_logprobs=prompt_logprobs.to_host(self._prompt_logprobs),
        )


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
        self._kv_dtype: torch.dtype = getattr(torch, config.cache.dtype)
        self._is_native = config.model.quantization != "none"  # as long as only CPUs quantise
        self._decode_graphs: DecodeGraphs | None = None
        self._chunk_graphs: ChunkGraphs | None = None
        self._host_embedding: Embedding | None = None  # that has no memory yet
        self._kv: tuple[KVLayer, ...] = ()
        self.report = StartupReport()
        if config.runner.num_threads and self._device.type == "cpu":
            _set_threads(config.runner.num_threads, native=self._is_native)
        with self._in_use():
            with self.report.phase("model"):
                packed_model = self._make_model()
            self._make_rows()
            self._load_and_compile(packed_model, progress)
            self._measure_what_stays()
            with self.report.phase("warm_up"):
                reserve_bytes = self._warm_up()
            with self.report.phase("cache"):
                self._make_cache(reserve_bytes)
            with self.report.phase("graphs"):
                self._make_graphs()
        self.report.memory_bytes["free"] = platform.memory_free_bytes()
        logger.info("load %.1f s (%s)", self.report.seconds["load"], self._loaded.source)
        if self._loaded.saved_s:
            self.report.seconds["saved"] = self._loaded.saved_s
        if self._loaded.keeper is not None:
            self._loaded.keeper.start()

    # -- start-up

    def _make_model(self) -> PackedModel | None:
        """The model without its weights, and itself once more if it packs them."""
        model = self._config.model
        with torch.device(self._device), _default_dtype(self._dtype):
            self._model = create_model(model.hf_config, model.max_model_len)
            if self._config.runner.embedding_on_host is not False:
                self._host_embedding = plan_embedding_on_host(self._model)
        if self._host_embedding is not None:
            self._platform.trim_memory()  # before what stays takes a piece of what was spared
        self._model.eval().requires_grad_(False)
        self._backend = get_backend(self._config.runner.attention_backend)
        if isinstance(self._backend, PreparedAttention):
            self._backend.check(self._model.attention_specs, self._dtype)
        return quantize(self._model, model.quantization)

    def _load_and_compile(self, packed_model: PackedModel | None, progress: bool) -> None:
        """On a GPU both at once: one waits for files, the other for compilers. Loading stays in
        this thread, where Ctrl-C finds it; if it fails, no more is compiled.
        """
        if self._device.type == "cpu":
            self._load(packed_model, progress)
            return
        stop = threading.Event()
        with ThreadPoolExecutor(1, "compile") as pool:
            compiling = pool.submit(self._in_use()(self._compile_kernels), stop)
            try:
                self._load(packed_model, progress)
            except BaseException:
                stop.set()
                raise
            compiling.result()

    def _load(self, packed_model: PackedModel | None, progress: bool) -> None:
        used_bytes = self._platform.memory_used_bytes()
        host_bytes = 0
        with self.report.phase("load"):
            if self._host_embedding is not None:
                must = self._config.runner.embedding_on_host
                free = None if must else CpuPlatform().memory_free_bytes()
                host_bytes = settle_on_host(self._host_embedding, free)
                self._host_embedding = None
            self._loaded = load_weights(self._model, self._config.model, progress, packed_model)
            if self._is_native:
                stack_layers(self._model)
            self._platform.synchronize()
        if self._device.type == "cpu":  # where memory is taken when it is first written to
            num_bytes = self._platform.memory_used_bytes() - used_bytes
        else:
            tensors = chain(self._model.parameters(), self._model.buffers())
            num_bytes = sum(tensor.nbytes for tensor in tensors) - host_bytes
        self.report.memory_bytes["weights"] = max(num_bytes, self._loaded.mapped_bytes, 0)
        if host_bytes:
            self.report.memory_bytes["host"] = host_bytes

    def _measure_what_stays(self) -> None:
        """What a GPU holds from now on: weights, the state of rows, buffers of the backend."""
        if self._device.type == "cpu":
            return
        self._platform.trim_memory()
        self._held_bytes = self._platform.memory_used_bytes()
        state_bytes = self._held_bytes - self.report.memory_bytes["weights"]
        self.report.memory_bytes["state"] = max(state_bytes, 0)

    def _make_rows(self) -> None:
        runner = self._config.runner
        max_blocks = -(-runner.max_model_len // self._config.cache.block_size)
        self._rows = DeviceRows(runner.max_num_seqs, max_blocks, self._device)
        self._sampler = Sampler(runner.max_num_seqs, self._config.model.vocab_size, self._device)
        self._prompt_logprobs = PromptLogprobs(self._device)
        block_size = self._config.cache.block_size
        self._prefixes = PrefixFinder(runner.max_num_seqs, max_blocks, block_size)

    def _compile_kernels(self, stop: threading.Event) -> None:
        """Have all kernels that this model needs compiled."""
        with self.report.phase("compile"):
            if isinstance(self._backend, PreparedAttention):
                self._backend.prepare(self._model.attention_specs, self._dtype, self._device)
            if self._backend.compiles_ahead:
                self._allocate(1)
                self._rehearse_steps(stop)
                self._kv = ()

    def _rehearse_steps(self, stop: threading.Event) -> None:
        """Go through a step of each kind that kernels are compiled for; none of ours is launched,
        and weights may be anything yet.
        """
        runner = self._config.runner
        longest = min(runner.max_num_batched_tokens, runner.max_model_len // 2)
        lens = sorted({min(16, longest), min(512, longest), longest}, reverse=True)
        plans = [_warm_up_plan(1, n, start=start) for n in lens for start in (0, n)]
        decodes, _ = self._new_graphs()
        most = runner.max_num_seqs
        sizes = [(size, False) for size in (*COMPILED_DECODES, most)]
        sizes += [(size, True) for size in _COMPILED_SHARED]
        # What takes longest to compile comes first.
        steps: list[Callable[[], object]] = [partial(self._run, plan) for plan in plans]
        steps.append(self._sampler.rehearse)
        steps += [
            partial(decodes.rehearse, size, shared=shared)
            for size, shared in dict.fromkeys(sizes)
            if size <= most
        ]
        with launch.compiling(self._device):
            for step in steps:
                if stop.is_set():
                    break
                step()
                self._rows.last_token_ids.zero_()  # what was never launched left no token
        self._platform.synchronize()

    def _warm_up(self) -> int:
        """Run the largest steps on a cache of one block; the bytes that they need.

        On a CPU, those of mapped weights, whose pages the system takes for free memory.
        """
        if self._device.type == "cpu":
            if self._loaded.mapped_bytes:  # a first request need not wait for a disk
                self._allocate(1)
                self.submit(_warm_up_plan(1, 1)).wait()
                self._kv = ()
            return self._loaded.mapped_bytes
        self._allocate(1)
        runner = self._config.runner
        chunk_len = min(runner.max_num_batched_tokens, runner.max_model_len)
        num_rows = min(runner.max_num_seqs, runner.max_num_batched_tokens // chunk_len)
        self._run(_warm_up_plan(num_rows, chunk_len)).wait()
        num_keys = max(min(MAX_GATHERED, runner.max_model_len), chunk_len)
        self._run(_warm_up_plan(1, chunk_len, start=num_keys - chunk_len)).wait()
        self._run(_warm_up_plan(runner.max_num_seqs, 1)).wait()
        if self._uses_graphs:
            decodes, chunks = self._new_graphs()
            decodes.capture(runner.max_num_seqs)
            if chunks.largest is not None:
                chunks.capture(chunks.largest)
            del decodes, chunks
        self._platform.synchronize()
        reserve_bytes = max(0, self._platform.memory_peak_bytes() - self._held_bytes)
        self.report.memory_bytes["workspace"] = reserve_bytes
        self._kv = ()
        self._platform.trim_memory()
        return reserve_bytes

    def _make_cache(self, reserve_bytes: int) -> None:
        cache = self._config.cache
        num_bytes = block_bytes(self._model.attention_specs, cache.block_size, self._kv_dtype)
        budget = memory.kv_budget_bytes(cache, self._platform, reserve_bytes)
        wanted = memory.count_blocks(cache, budget, num_bytes)
        self.num_blocks = memory.shrink_until_it_fits(wanted, self._allocate)
        self.report.memory_bytes["kv"] = self.num_blocks * num_bytes

    def _allocate(self, num_blocks: int) -> None:
        specs, block_size = self._model.attention_specs, self._config.cache.block_size
        self._kv = ()
        self._kv = allocate_kv(specs, num_blocks, block_size, self._kv_dtype, self._device)

    @property
    def _uses_graphs(self) -> bool:
        return not self._config.runner.enforce_eager and self._backend.captures_decodes

    def _make_graphs(self) -> None:
        if not self._uses_graphs:
            return
        used = self._platform.memory_used_bytes()
        decodes, chunks = self._decode_graphs, self._chunk_graphs = self._new_graphs()
        for size in _FIRST_DECODES:
            if size in decodes.ladder:
                decodes.capture(size)
        for num_tokens in _FIRST_CHUNKS:
            if num_tokens in chunks.token_ladder:
                chunks.capture(StepSize(num_tokens, 0, chunks.chunk_ladder[0], is_fresh=True))
        self._platform.synchronize()
        self.report.memory_bytes["graphs"] = self._platform.memory_used_bytes() - used

    def _new_graphs(self) -> tuple[DecodeGraphs, ChunkGraphs]:
        runner, capturer = self._config.runner, Capturer(self._device)
        model = StepModel(
            self._forward,
            self._pick_greedily,
            self._rows,
            self._config.cache.block_size,
            runner.max_model_len,
        )
        widest = max(parameter.shape[0] for parameter in self._layer_parameters())
        most_tokens = _CHUNK_GRAPH_BYTES // (widest * self._dtype.itemsize)
        max_tokens = min(runner.max_num_batched_tokens, most_tokens)
        if not self._backend.captures_chunks:
            max_tokens = 0
        return DecodeGraphs(model, capturer), ChunkGraphs(model, capturer, max_tokens)

    def _layer_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Weights of the layers; embedding and head see few tokens or copy them."""
        for name, parameter in self._model.named_parameters():
            if ".layers." in f".{name}" and parameter.ndim == 2:
                yield parameter

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """How any thread works on the device."""
        with torch.inference_mode(), self._platform.active():
            yield

    # -- steps

    def submit(self, plan: StepPlan) -> PendingStep:
        """Queue a step on the device; on a CPU it runs here and now."""
        with self._in_use(), in_charge(self._is_native):
            self._update_rows(plan)
            step = self._replay(plan)
            return self._run(plan) if step is None else self._after_replay(plan, step)

    def set_last_tokens(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Replace the rows' next input tokens, which the device has sampled: for replays."""
        with self._in_use():
            ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
            self._rows.last_token_ids[list(rows)] = ids

    def prepare_more(self) -> bool:
        """Use an idle moment: capture one more graph. False when there is nothing left to do."""
        decodes, chunks = self._decode_graphs, self._chunk_graphs
        if decodes is None or chunks is None:
            return False
        with self._in_use():
            for size in decodes.ladder:
                if not decodes.is_captured(size):
                    decodes.capture(size)
                    return True
            ladders = chunks.token_ladder, chunks.decode_ladder, (True, False)
            for num_tokens, num_decodes, fresh in product(*ladders):
                step_size = StepSize(num_tokens, num_decodes, chunks.chunk_ladder[0], fresh)
                if num_decodes < num_tokens and not chunks.is_captured(step_size):
                    chunks.capture(step_size)
                    return True
        return False

    def close(self) -> None:
        """Free the device's memory. The runner cannot be used afterwards."""
        if self._loaded.keeper is not None:
            self._loaded.keeper.stop()
        self._platform.synchronize()
        self._decode_graphs = self._chunk_graphs = None
        self._kv = ()
        del self._model, self._rows, self._sampler, self._backend
        gc.collect()  # graphs and runner refer to each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _update_rows(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            self._sampler.free(row)
            self._prompt_logprobs.free(row)
        for admission in plan.admitted:
            self._sampler.admit(admission)
            self._prompt_logprobs.admit(admission)
        self._rows.update(plan)
        self._prefixes.update(plan)

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        last_batch: AttentionBatch | None = None,
    ) -> torch.Tensor:
        context = ForwardContext(batch, self._kv, self._backend, last_batch)
        hidden: torch.Tensor = self._model(token_ids, positions, context)
        return hidden

    def _replay(self, plan: StepPlan) -> GraphStep | None:
        """Queue the step as a graph, where there is one for it."""
        if self._decode_graphs is None or self._chunk_graphs is None:
            return None
        greedy = self._sampler.is_plain_greedy(plan.rows[plan.samples])
        if plan.num_decodes == len(plan.rows):
            prefix = self._prefixes.find(plan.rows)
            return self._decode_graphs.replay(plan.rows, greedy=greedy, prefix=prefix)
        if self._prompt_logprobs.wants_any(plan.rows) or count_gathered(plan):
            return None
        return self._chunk_graphs.try_replay(plan, greedy=greedy)

    def _after_replay(self, plan: StepPlan, step: GraphStep) -> PendingStep:
        if step.token_ids is not None:
            return self._pending(step.token_ids, [], {})
        assert step.hidden is not None
        sample_rows = to_device(plan.rows[plan.samples].astype(np.int64), self._device)
        return self._sample(plan, step.hidden, sample_rows, {})

    def _run(self, plan: StepPlan) -> PendingStep:
        """Any step, operation by operation."""
        want_all = self._prompt_logprobs.wants_any(plan.rows)
        block_size = self._config.cache.block_size
        inputs = build_inputs(plan, self._rows, block_size, want_all=want_all)
        hidden = self._forward(inputs.token_ids, inputs.positions, inputs.batch, inputs.last_batch)
        self._rows.num_computed[inputs.seq_rows] = inputs.seq_lens
        prompt_results = self._prompt_logprobs.compute(plan, hidden, self._model.compute_logits)
        sampled = hidden[inputs.sample_indices]
        return self._sample(plan, sampled, inputs.sample_rows, prompt_results)

    def _sample(
        self,
        plan: StepPlan,
        hidden: torch.Tensor,  # [num_samples, hidden_size]
        sample_rows: torch.Tensor,  # [num_samples] int64
        prompt_results: dict[int, list[SampledLogprobs]],
    ) -> PendingStep:
        """Logits and tokens, piece by piece, which bounds the memory they take."""
        rows, positions = plan.rows[plan.samples], (plan.starts + plan.chunk_lens)[plan.samples]
        if not len(rows):
            return PendingStep(torch.empty(0, dtype=torch.int64), [], prompt_results)
        pieces, logprobs = [], []
        for start in range(0, len(rows), _LOGITS_PIECE):
            part = slice(start, start + _LOGITS_PIECE)
            logits = self._model.compute_logits(hidden[part])
            token_ids, reported = self._sampler.sample(logits, rows[part], positions[part])
            pieces.append(token_ids)
            if reported is not None:
                logprobs.append(reported)
        token_ids = torch.cat(pieces)
        self._rows.last_token_ids[sample_rows] = token_ids
        return self._pending(token_ids, logprobs, prompt_results)

    def _pick_greedily(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> the most likely tokens, [n] int64."""
        pieces = torch.split(hidden, _LOGITS_PIECE)
        chosen = [argmax(self._model.compute_scores(piece)) for piece in pieces]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)

    def _pending(
        self,
        token_ids: torch.Tensor,
        logprobs: list[SampledLogprobs],
        prompt_results: dict[int, list[SampledLogprobs]],
    ) -> PendingStep:
        if self._device.type == "cpu":
            return PendingStep(token_ids, logprobs, prompt_results)
        host = to_host(token_ids)
        logprobs = [reported.on_its_way() for reported in logprobs]
        prompt_results = {
            row: [reported.on_its_way() for reported in pieces]
            for row, pieces in prompt_results.items()
        }
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return PendingStep(host, logprobs, prompt_results, done)


def _set_threads(num_threads: int, *, native: bool) -> None:
    """To the pool that does the work: idle threads of the other would spin on its cores."""
    torch.set_num_threads(1 if native else num_threads)
    library.set_threads(num_threads if native else 1)


def _warm_up_plan(
    num_rows: int, chunk_len: int, *, start: int = 0, num_decodes: int = 0
) -> StepPlan:
    """`num_rows` chunks that all read and write block 0."""
    return StepPlan(
        step=-1,
        rows=np.arange(num_rows, dtype=np.int32),
        starts=np.full(num_rows, start, np.int32),
        chunk_lens=np.full(num_rows, chunk_len, np.int32),
        samples=np.ones(num_rows, np.bool_),
        num_decodes=num_decodes,
        token_ids=np.zeros((num_rows - num_decodes) * chunk_len, np.int32),
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
