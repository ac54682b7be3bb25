"""`resolve`: every "auto" decided, every contradiction named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from octavo.checkpoint import Checkpoint
from octavo.config import DeviceInfo, EngineArgs, EngineConfig, resolve
from octavo.errors import ConfigError, UnsupportedModelError

CPU = DeviceInfo(
    kind="cpu",
    name="a CPU",
    total_memory_bytes=1 << 34,
    free_memory_bytes=1 << 33,
    num_cores=6,
    default_dtype="float32",
    dtypes=("float32", "bfloat16"),
    attention_backends=("torch",),
)
GPU = DeviceInfo(
    kind="cuda",
    name="a GPU",
    total_memory_bytes=1 << 36,
    free_memory_bytes=1 << 36,
    num_cores=6,
    default_dtype="bfloat16",
    dtypes=("bfloat16", "float16", "float32"),
    attention_backends=("quick", "torch"),
    supports_graphs=True,
    reads_host_memory=True,
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def checkpoint(config: dict[str, Any] | None = None, **fields: Any) -> Checkpoint:
    settings = {
        "model": "org/model",
        "path": Path("folder"),
        "weights_format": "safetensors",
        "weight_files": (Path("folder/model.safetensors"),),
        "config": CONFIG | (config or {}),
    }
    return Checkpoint(**(settings | fields))


def resolved(
    device: DeviceInfo = CPU, found: Checkpoint | None = None, **options: Any
) -> EngineConfig:
    return resolve(EngineArgs.from_options(**options), found or checkpoint(), device)


def test_what_a_cpu_gets() -> None:
    config = resolved()
    assert config.scheduler.max_num_seqs == 64
    assert config.scheduler.max_num_batched_tokens == 256
    assert config.scheduler.async_depth == 0
    assert config.runner.enforce_eager
    assert config.runner.embedding_on_host is False
    assert config.runner.num_threads == 6
    assert config.runner.attention_backend == "torch"
    assert config.model.dtype == "float32"
    assert config.model.packed_cache_bytes == 20 << 30
    assert config.model.max_model_len == 4096
    assert not config.cache.require_full_context


def test_what_a_gpu_gets() -> None:
    config = resolved(GPU)
    assert config.scheduler.max_num_seqs == 1024
    assert config.scheduler.max_num_batched_tokens == 8192
    assert config.scheduler.async_depth == 1
    assert not config.runner.enforce_eager
    assert config.runner.embedding_on_host is None
    assert config.runner.attention_backend == "quick"
    assert config.model.dtype == "bfloat16"


def test_what_the_user_says_goes() -> None:
    config = resolved(
        GPU,
        dtype="float16",
        attention_backend="torch",
        max_model_len=1000,
        max_num_seqs=7,
        max_num_batched_tokens=70,
        async_scheduling=False,
        enforce_eager=True,
        embedding_on_host=False,
        block_size=32,
        scheduling_policy="priority",
        enable_prefix_caching=False,
        num_threads=3,
    )
    assert config.model.dtype == "float16"
    assert config.runner.attention_backend == "torch"
    assert config.scheduler.async_depth == 0
    assert config.scheduler.policy == "priority"
    assert config.runner.enforce_eager
    assert config.runner.embedding_on_host is False
    assert config.runner.num_threads == 3
    assert config.cache.require_full_context
    for section in (config.scheduler, config.runner):
        assert (section.max_num_seqs, section.max_num_batched_tokens) == (7, 70)
        assert section.max_model_len == 1000
    assert config.cache.block_size == config.scheduler.block_size == 32
    assert not (config.cache.enable_prefix_caching)
    assert not (config.scheduler.enable_prefix_caching)


@pytest.mark.parametrize(
    ("own", "device", "expected"),
    [
        ("float32", GPU, "float32"),  # a model made in float32 keeps it
        ("float16", GPU, "bfloat16"),  # half precisions are interchangeable
        (None, GPU, "bfloat16"),
        ("bfloat16", CPU, "float32"),
        ("float32", CPU, "float32"),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_auto(own: str | None, device: DeviceInfo, expected: str, key: str) -> None:
    config = {"torch_dtype": None, key: own}
    assert resolved(device, checkpoint(config)).model.dtype == expected


NATIVE = dataclasses.replace(CPU, quantizations=("int8",), attention_backends=("native", "torch"))


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        (CPU, {}, "float32"),
        (GPU, {}, "bfloat16"),
        (GPU, {"kv_cache_dtype": "bfloat16"}, "bfloat16"),
        (NATIVE, {}, "float16"),
        (NATIVE, {"quantization": "none"}, "float32"),
        (NATIVE, {"attention_backend": "torch"}, "float32"),
        (NATIVE, {"quantization": "none", "attention_backend": "native"}, "float32"),
        (NATIVE, {"dtype": "float32"}, "float32"),  # who names a dtype wants that precision
        (NATIVE, {"kv_cache_dtype": "float32"}, "float32"),
        (NATIVE, {"kv_cache_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_kv_cache_dtype(device: DeviceInfo, options: dict[str, Any], expected: str) -> None:
    assert resolved(device, **options).cache.dtype == expected


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_cache_of_another_precision_needs_the_native_kernels(device: DeviceInfo) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype float16 .* choose one of auto"):
        resolved(device, kv_cache_dtype="float16")


def test_a_cache_in_what_is_no_number() -> None:
    args = dataclasses.replace(EngineArgs(), kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match="kv_cache_dtype int8"):
        resolve(args, checkpoint(), NATIVE)


def test_a_large_batch_raises_the_default_budget() -> None:
    assert resolved(max_num_seqs=600).scheduler.max_num_batched_tokens == 600


def test_a_config_without_a_context_length() -> None:
    found = checkpoint({"max_position_embeddings": None})
    assert resolved(found=found).model.max_model_len == 2048
    assert resolved(found=found, max_model_len=9999).model.max_model_len == 9999


@pytest.mark.parametrize(
    ("generation", "own", "expected"),
    [
        ({"eos_token_id": [5, 6]}, 2, (5, 6)),
        ({}, 2, (2,)),
        ({"eos_token_id": None}, [1, 2], (1, 2)),
        ({"eos_token_id": 0}, 2, (0,)),
        ({}, None, ()),
    ],
)
def test_eos(generation: dict[str, Any], own: Any, expected: tuple[int, ...]) -> None:
    found = checkpoint({"eos_token_id": own}, generation_config=generation)
    assert resolved(found=found).model.eos_token_ids == expected


def test_dummy_weights_need_no_files() -> None:
    found = checkpoint(weights_format="none", weight_files=())
    assert resolved(found=found, load_format="dummy").model.load_format == "dummy"
    with pytest.raises(ConfigError, match="no weights"):
        resolved(found=found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "float16 is not supported on a CPU; choose one of float32"),
        ({"attention_backend": "quick"}, "'quick' is not available on a CPU; .* torch"),
        ({"max_model_len": 4097}, "4097.*4096"),
        ({"max_num_seqs": 60, "max_num_batched_tokens": 50}, "at least max_num_seqs"),
        ({"block_size": 12}, "block_size"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"load_format": "gguf"}, "does not fit"),
        *(
            ({name: value}, f"{name} must be positive")
            for name in (
                "max_model_len",
                "max_num_seqs",
                "max_num_batched_tokens",
                "kv_cache_memory_bytes",
                "num_gpu_blocks_override",
            )
            for value in (0, -1)
        ),
        ({"num_threads": -1}, "num_threads must be 0 or more"),
        ({"packed_cache_bytes": -1}, "packed_cache_bytes must be 0 or more"),
        ({"priority_ageing_s": float("inf")}, "priority_ageing_s must be 0 or more"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold must be 0 or more"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(**options)


def test_a_backend_that_could_be_installed_is_said_how() -> None:
    install = {"optional": "pip install 'octavo[optional]'"}
    device = dataclasses.replace(GPU, missing_backends=install)
    message = r"'optional' is not installed.*: pip install 'octavo\[optional\]', or .* quick, torch"
    with pytest.raises(ConfigError, match=message):
        resolved(device, attention_backend="optional")
    assert resolved(device).runner.attention_backend == "quick"
    installed = dataclasses.replace(GPU, attention_backends=("quick", "optional", "torch"))
    assert resolved(installed).runner.attention_backend == "quick"
    assert resolved(installed, attention_backend="optional").runner.attention_backend == "optional"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": []}, "architectures"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": "100"}, "vocab_size"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"max_position_embeddings": -5}, "max_position_embeddings"),
    ],
)
def test_a_config_that_is_no_use(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        resolved(found=checkpoint(config))


def test_sections_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved().scheduler.max_num_seqs = 3  # type: ignore[misc]


def test_an_embedding_on_the_host_needs_a_device_that_reads_it() -> None:
    with pytest.raises(ConfigError, match="embedding_on_host needs an NVIDIA GPU"):
        resolved(CPU, embedding_on_host=True)
    assert resolved(CPU, embedding_on_host=False).runner.embedding_on_host is False
    assert resolved(GPU, embedding_on_host=True).runner.embedding_on_host
