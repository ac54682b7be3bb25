"""`EngineArgs`: the options as users give them, under vLLM's names where the meaning is the same.

The offline `LLM(...)`, every CLI command and `--config FILE.yaml` build this one object, so an
option exists in one place and an unknown one is refused in one place.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from octavo.errors import ConfigError


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that carries its command-line help."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


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
    max_model_len: int | None = option(
        None, "context length, tokens (default: the model's, as far as memory allows)"
    )
    seed: int = option(0, "seed of dummy weights and of requests that bring none")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda"))
    num_threads: int = option(0, "CPU threads of the engine (0: all cores this process may use)")
    attention_backend: str = option(
        "auto", "attention implementation; `octavo doctor` lists those available"
    )
    enforce_eager: bool = option(False, "never capture device graphs")
    block_size: int = option(16, "tokens per KV-cache block")
    enable_prefix_caching: bool = option(True, "reuse the KV cache of equal prompt beginnings")
    gpu_memory_utilization: float = option(0.9, "share of the device's memory the engine may use")
    kv_cache_memory_bytes: int | None = option(
        None, "KV-cache size, instead of what gpu_memory_utilization leaves"
    )
    num_gpu_blocks_override: int | None = option(None, "KV-cache size in blocks (for tests)")
    max_num_seqs: int | None = option(
        None, "most sequences that run at once (default: 64 on a CPU, 1024 on a GPU)"
    )
    max_num_batched_tokens: int | None = option(
        None, "token budget of a step (default: 512 on a CPU, 8192 on a GPU)"
    )
    long_prefill_token_threshold: int = option(
        0, "most tokens of one prompt in one step (0: no limit)"
    )
    scheduling_policy: str = option("fcfs", "order of the waiting queue", ("fcfs", "priority"))
    async_scheduling: bool | None = option(
        None, "plan the next step while one runs (default: on a GPU)"
    )

    @classmethod
    def from_options(cls, **options: Any) -> EngineArgs:
        """Build from keyword options.

        Raises:
            ConfigError: an unknown option (with the nearest known name) or one of the wrong type.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"Unknown option {name!r}.{hint} Known options: {', '.join(sorted(known))}."
                )
        args = cls(**options)
        for name in options:
            _check_type(known[name], getattr(args, name))
        return args


_TYPES = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "None": (type(None),),
}


def _check_type(field: dataclasses.Field[Any], value: Any) -> None:
    names = [part.strip() for part in str(field.type).split("|")]
    allowed = tuple(t for name in names for t in _TYPES[name])
    if not isinstance(value, allowed) or (isinstance(value, bool) and "bool" not in names):
        raise ConfigError(f"Option {field.name!r} takes {field.type}, not {value!r}.")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(
            f"Option {field.name!r} must be one of {', '.join(choices)}, not {value!r}."
        )
