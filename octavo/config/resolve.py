"""`resolve()`: from what users ask for to what components are handed. Every "auto" is decided
here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, get_args

from octavo.config.args import EngineArgs
from octavo.config.sections import (
    CacheConfig,
    DeviceInfo,
    DType,
    EngineConfig,
    LoadFormat,
    ModelConfig,
    Quantization,
    RunnerConfig,
    SchedulerConfig,
    SchedulingPolicy,
)
from octavo.errors import ConfigError, UnsupportedModelError

_DEFAULT_MAX_MODEL_LEN = 2048  # where a config names no context length
_CPU_DEFAULTS = (64, 256)  # max_num_seqs, max_num_batched_tokens
_GPU_DEFAULTS = (1024, 8192)
_BLOCK_SIZES = (8, 16, 32, 64, 128)
_POSITIVE = (  # None, where allowed, means "decide for me"
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
)
_NOT_NEGATIVE = (
    *("num_threads", "packed_cache_bytes", "long_prefill_token_threshold", "priority_ageing_s"),
)


class CheckpointFacts(Protocol):
    """What `resolve` needs to know of a checkpoint; `octavo.checkpoint.Checkpoint` has it."""

    @property
    def model(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def weights_format(self) -> str: ...
    @property
    def weight_files(self) -> tuple[Path, ...]: ...
    @property
    def quantized_file(self) -> Path | None: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def generation_config(self) -> Mapping[str, Any]: ...


def resolve(args: EngineArgs, checkpoint: CheckpointFacts, device: DeviceInfo) -> EngineConfig:
    """Decide everything that was left open.

    Raises:
        ConfigError: an option cannot be honoured on this device or with this model.
        UnsupportedModelError: the checkpoint's config lacks what is needed to build a model.
    """
    hf = checkpoint.config
    max_model_len = _max_model_len(args, hf)
    on_cpu = device.kind == "cpu"
    default_seqs, default_tokens = _CPU_DEFAULTS if on_cpu else _GPU_DEFAULTS
    _check_numbers(args)
    max_num_seqs = args.max_num_seqs or default_seqs
    max_tokens = args.max_num_batched_tokens or max(default_tokens, max_num_seqs)
    if max_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({max_tokens}) must be at least max_num_seqs "
            f"({max_num_seqs}): every running sequence needs a token of each step. "
            "Raise the one or lower the other."
        )
    if args.block_size not in _BLOCK_SIZES:
        raise ConfigError(f"block_size must be one of {_BLOCK_SIZES}, not {args.block_size}.")
    is_async = (not on_cpu) if args.async_scheduling is None else args.async_scheduling
    model = _model_config(args, checkpoint, device, max_model_len)
    backend = _attention_backend(args, device, model.quantization)
    return EngineConfig(
        model=model,
        cache=CacheConfig(
            block_size=args.block_size,
            dtype=_kv_cache_dtype(args, model, backend),
            enable_prefix_caching=args.enable_prefix_caching,
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            gpu_memory_utilization=args.gpu_memory_utilization,
            require_full_context=args.max_model_len is not None,
            num_blocks_override=args.num_gpu_blocks_override,
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_tokens,
            max_model_len=max_model_len,
            block_size=args.block_size,
            policy=cast(SchedulingPolicy, args.scheduling_policy),
            enable_prefix_caching=args.enable_prefix_caching,
            long_prefill_token_threshold=args.long_prefill_token_threshold,
            async_depth=1 if is_async else 0,
            priority_ageing_s=args.priority_ageing_s,
        ),
        runner=RunnerConfig(
            device=device.kind,
            num_threads=args.num_threads or device.num_cores,
            attention_backend=backend,
            enforce_eager=args.enforce_eager or not device.supports_graphs,
            embedding_on_host=_embedding_on_host(args, device),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_tokens,
            max_model_len=max_model_len,
        ),
    )


def _model_config(
    args: EngineArgs, checkpoint: CheckpointFacts, device: DeviceInfo, max_model_len: int
) -> ModelConfig:
    hf = dict(checkpoint.config)
    architectures = hf.get("architectures") or []
    if not architectures:
        raise UnsupportedModelError(
            f"The config of {checkpoint.model} names no `architectures`; cannot tell what it is."
        )
    if args.load_format != "dummy" and checkpoint.weights_format == "none":
        raise ConfigError(
            f"{checkpoint.path} holds no weights. Use load_format='dummy' for random ones."
        )
    load_format = "dummy" if args.load_format == "dummy" else checkpoint.weights_format
    if args.load_format not in ("auto", load_format):
        raise ConfigError(
            f"load_format {args.load_format!r} does not fit: the weights are {load_format}."
        )
    dtype = _dtype(args, hf, device)
    quantization = _quantization(args, dtype, device)
    weight_files = checkpoint.weight_files
    if quantization != "none" and args.load_format == "auto" and checkpoint.quantized_file:
        load_format, weight_files = "gguf", (checkpoint.quantized_file,)
    return ModelConfig(
        model=checkpoint.model,
        path=checkpoint.path,
        load_format=cast(LoadFormat, load_format),
        weight_files=weight_files,
        hf_config=hf,
        architecture=str(architectures[0]),
        dtype=dtype,
        quantization=quantization,
        packed_cache_bytes=args.packed_cache_bytes,
        max_model_len=max_model_len,
        vocab_size=_config_int(hf, "vocab_size"),
        eos_token_ids=_eos_token_ids(checkpoint.generation_config, hf),
        seed=args.seed,
    )


def _max_model_len(args: EngineArgs, hf: Mapping[str, Any]) -> int:
    has_limit = hf.get("max_position_embeddings") is not None
    limit = _config_int(hf, "max_position_embeddings") if has_limit else None
    if args.max_model_len is None:
        return limit or _DEFAULT_MAX_MODEL_LEN
    wanted = args.max_model_len
    if limit and wanted > limit:
        raise ConfigError(
            f"max_model_len ({wanted}) is more than the model was made for ({limit} tokens, "
            "max_position_embeddings). Lower it."
        )
    return wanted


def _dtype(args: EngineArgs, hf: Mapping[str, Any], device: DeviceInfo) -> DType:
    if args.dtype != "auto":
        if args.dtype not in device.dtypes:
            raise ConfigError(
                f"dtype {args.dtype} is not supported on {device.name}; "
                f"choose one of {', '.join(device.dtypes)}."
            )
        return args.dtype
    own = hf.get("dtype") or hf.get("torch_dtype")
    # A model made in float32 keeps it; half precisions are interchangeable, the device's is faster.
    return "float32" if own == "float32" else device.default_dtype


def _quantization(args: EngineArgs, dtype: DType, device: DeviceInfo) -> Quantization:
    if args.quantization == "auto":
        # Who names a dtype wants that precision.
        is_open = args.dtype == "auto" and dtype == "float32"
        return device.quantizations[0] if is_open and device.quantizations else "none"
    wanted = cast(Quantization, args.quantization)
    if wanted == "none":
        return wanted
    if wanted not in device.quantizations:
        raise ConfigError(
            f"quantization {wanted!r} is not available on {device.name}: it needs a CPU and "
            "Octavo's native kernels, which are built at installation where there is a C compiler."
        )
    if dtype != "float32":
        raise ConfigError(f"quantization {wanted!r} computes in float32, not {dtype}.")
    return wanted


def _kv_cache_dtype(args: EngineArgs, model: ModelConfig, attention_backend: str) -> DType:
    is_native = attention_backend == "native" and model.quantization != "none"
    if args.kv_cache_dtype == "auto":
        # Decodes of many sequences are bound by reading the cache; 8-bit activations lose far more.
        return "float16" if is_native else model.dtype
    choices = get_args(DType) if is_native else (model.dtype,)
    if args.kv_cache_dtype not in choices:
        raise ConfigError(
            f"kv_cache_dtype {args.kv_cache_dtype} is not available with dtype {model.dtype}, "
            f"quantization {model.quantization} and attention_backend {attention_backend}; "
            f"choose one of auto, {', '.join(choices)}."
        )
    return cast(DType, args.kv_cache_dtype)


def _embedding_on_host(args: EngineArgs, device: DeviceInfo) -> bool | None:
    if args.embedding_on_host and not device.reads_host_memory:
        raise ConfigError(
            f"embedding_on_host needs an NVIDIA GPU under Linux, which reads the host's memory in "
            f"place; {device.name} does not. Leave it out."
        )
    return args.embedding_on_host if device.reads_host_memory else False


def _attention_backend(args: EngineArgs, device: DeviceInfo, quantization: Quantization) -> str:
    if args.attention_backend == "auto":
        if device.kind == "cpu" and quantization == "none":
            return "torch"  # else two thread pools would take turns on the same cores
        return device.attention_backends[0]
    if args.attention_backend in device.attention_backends:
        return args.attention_backend
    choices = f"choose one of {', '.join(device.attention_backends)}."
    if args.attention_backend in device.missing_backends:
        raise ConfigError(
            f"attention_backend {args.attention_backend!r} is not installed. Install it with: "
            f"{device.missing_backends[args.attention_backend]}, or {choices}"
        )
    raise ConfigError(
        f"attention_backend {args.attention_backend!r} is not available on {device.name}; {choices}"
    )


def _eos_token_ids(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    """From the first config that names any."""
    for config in configs:
        eos = config.get("eos_token_id")
        if isinstance(eos, int):
            return (eos,)
        if isinstance(eos, Sequence) and not isinstance(eos, str):
            return tuple(int(token_id) for token_id in eos)
    return ()


def _config_int(hf: Mapping[str, Any], name: str) -> int:
    value = hf.get(name)
    if not isinstance(value, int) or value <= 0:
        raise UnsupportedModelError(f"The model's config has no usable {name!r} (got {value!r}).")
    return value


def _check_numbers(args: EngineArgs) -> None:
    """Ranges that need nothing but the option itself."""
    for name in _POSITIVE:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be positive, got {value}.")
    for name in _NOT_NEGATIVE:
        if not 0 <= getattr(args, name) < math.inf:
            raise ConfigError(f"{name} must be 0 or more, got {getattr(args, name)}.")
    if not 0.0 < args.gpu_memory_utilization <= 1.0:
        raise ConfigError("gpu_memory_utilization must be above 0 and at most 1.")
