"""`EngineArgs`: the options as users give them, under vLLM's names where the meaning is the same.

The offline `LLM(...)`, every CLI command and `--config FILE.yaml` build this one object, so an
option exists in one place and an unknown one is refused in one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from octavo.config.options import from_options, option


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    model: str = option("smollm2-135m", "built-in name, hub id, folder or .gguf file")
    tokenizer: str | None = option(
        None, "folder or hub id of the tokenizer, if not the model's own"
    )
    revision: str | None = option(None, "branch, tag or commit on the hub")
    download_dir: str | None = option(None, "where hub downloads are kept (default: HF_HOME)")
    load_format: str = option(
        "auto", "how the weights are stored", ("auto", "safetensors", "gguf", "dummy")
    )
    dtype: str = option(
        "auto", "precision of weights and activations", ("auto", "float32", "bfloat16", "float16")
    )
    quantization: str = option(
        "auto",
        "int8: 8-bit activations, weights in 8 bits or as a .gguf file has them "
        "(auto: on a CPU with the native kernels, unless dtype is given)",
        ("auto", "none", "int8"),
    )
    packed_cache_bytes: int = option(
        20 << 30,
        "most bytes on disk, in all, of quantised weights as a CPU needs them, which make the next "
        "start faster (default: 20G; 0: none)",
    )
    max_model_len: int | None = option(
        None, "context length, tokens (default: the model's, as far as memory allows)"
    )
    seed: int = option(0, "seed of dummy weights; given to LLM(), also of prompts that bring none")
    device: str = option("auto", "where to run: auto, cpu, cuda or cuda:1")
    num_threads: int = option(0, "CPU threads of the engine (0: all cores this process may use)")
    attention_backend: str = option(
        "auto", "attention implementation; `octavo doctor` lists those available"
    )
    enforce_eager: bool = option(False, "never capture device graphs")
    kv_cache_dtype: str = option(
        "auto",
        "precision of cached keys and values (auto: float16 for native int8 kernels, else dtype)",
        ("auto", "float32", "bfloat16", "float16"),
    )
    block_size: int = option(16, "tokens per KV-cache block")
    enable_prefix_caching: bool = option(True, "reuse the KV cache of equal prompt beginnings")
    gpu_memory_utilization: float = option(0.9, "share of the device's memory the engine may use")
    embedding_on_host: bool | None = option(
        None,
        "keep the token embedding, unless the head shares it, in the host's memory, where the GPU "
        "looks rows up, so that the KV cache gets its room (default: on an NVIDIA GPU, if the host "
        "has as much to spare)",
    )
    kv_cache_memory_bytes: int | None = option(
        None, "KV-cache size, instead of what gpu_memory_utilization leaves"
    )
    num_gpu_blocks_override: int | None = option(None, "KV-cache size in blocks (for tests)")
    max_num_seqs: int | None = option(
        None, "most sequences that run at once (default: 64 on a CPU, 1024 on a GPU)"
    )
    max_num_batched_tokens: int | None = option(
        None, "token budget of a step (default: 256 on a CPU, 8192 on a GPU)"
    )
    long_prefill_token_threshold: int = option(
        0, "most tokens of one prompt in one step (0: no limit)"
    )
    scheduling_policy: str = option("fcfs", "order of the waiting queue", ("fcfs", "priority"))
    priority_ageing_s: float = option(
        60.0, "seconds of waiting that make up for one level of priority (0: none do)"
    )
    async_scheduling: bool | None = option(
        None, "plan the next step while one runs (default: on a GPU)"
    )

    @classmethod
    def from_options(cls, **options: Any) -> EngineArgs:
        """Build from keyword options. Raises ConfigError for one that is unknown or malformed."""
        return from_options(cls, options)
