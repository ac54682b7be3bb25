"""The sections that components are handed. Nothing here is "auto": `resolve()` has decided it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

DType = Literal["float32", "bfloat16", "float16"]
LoadFormat = Literal["safetensors", "gguf", "dummy"]
Quantization = Literal["none", "int8"]
SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What a platform says of its device, as far as configuration depends on it."""

    kind: str  # "cpu", "cuda"
    name: str
    total_memory_bytes: int
    free_memory_bytes: int
    num_cores: int  # CPU cores this process may use
    default_dtype: DType  # used where the checkpoint's own dtype is slow or missing here
    dtypes: tuple[DType, ...]  # supported, fastest first
    attention_backends: tuple[str, ...]  # available, preferred first
    # Backends that another package would bring, and how to install it.
    missing_backends: Mapping[str, str] = field(default_factory=dict)
    supports_graphs: bool = False
    reads_host_memory: bool = False  # kernels read pinned memory of the host in place
    quantizations: tuple[Quantization, ...] = ()  # available, preferred first


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is loaded: the checkpoint's files and its own config."""

    model: str  # as the user named it
    path: Path  # folder, or the .gguf file
    load_format: LoadFormat
    weight_files: tuple[Path, ...]
    hf_config: dict[str, Any] = field(repr=False)  # the text model's config.json, unnested
    architecture: str
    dtype: DType
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    seed: int
    quantization: Quantization = "none"
    packed_cache_bytes: int = 0  # of packed weights on disk, of all models; 0: none are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    block_size: int
    dtype: DType
    enable_prefix_caching: bool
    kv_cache_memory_bytes: int | None  # None: measured after warm-up, from gpu_memory_utilization
    gpu_memory_utilization: float
    # False: a cache too small for the model's own context limits it instead of failing.
    require_full_context: bool = False
    num_blocks_override: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    max_num_seqs: int  # device rows
    max_num_batched_tokens: int  # token budget of a step
    max_model_len: int
    block_size: int
    policy: SchedulingPolicy
    enable_prefix_caching: bool
    long_prefill_token_threshold: (
        int  # a prompt gets at most so many tokens in one step; 0: no limit
    )
    async_depth: (
        int  # steps that may be in flight beyond the one that is waited for; 0: synchronous
    )
    priority_ageing_s: float = 0.0  # waiting that makes up for one level of priority; 0: none does


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    device: str  # "cpu", "cuda:0"
    num_threads: int  # CPU threads for torch; 0: leave as is
    attention_backend: str
    enforce_eager: bool
    embedding_on_host: bool | None  # unless the head shares it; None: if the host has room
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    runner: RunnerConfig
