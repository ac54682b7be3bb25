"""How large the KV cache becomes, and the tensors that it is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from octavo.attention.base import AttentionSpec
from octavo.config import CacheConfig, DeviceInfo
from octavo.errors import ConfigError
from octavo.runner.graphs import batch_ladder
from octavo.runner.kv import allocate_kv, block_bytes
from octavo.runner.memory import count_blocks, kv_budget_bytes, shrink_until_it_fits

GIB = 1 << 30
CACHE = CacheConfig(
    block_size=16,
    dtype="float32",
    enable_prefix_caching=True,
    kv_cache_memory_bytes=None,
    gpu_memory_utilization=0.9,
)


@dataclasses.dataclass
class FakePlatform:
    kind: str
    free: int
    total: int

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.kind)

    def memory_free_bytes(self) -> int:
        return self.free

    def info(self) -> DeviceInfo:
        return DeviceInfo(
            kind=self.kind,
            name="fake",
            total_memory_bytes=self.total,
            free_memory_bytes=self.free,
            num_cores=1,
            default_dtype="float32",
            dtypes=("float32",),
            attention_backends=("torch",),
        )


def budget(platform: FakePlatform, reserve: int = 0, **changes: Any) -> int:
    config = dataclasses.replace(CACHE, **changes)
    return kv_budget_bytes(config, platform, reserve)  # type: ignore[arg-type]


def test_a_size_that_was_asked_for_goes() -> None:
    assert budget(FakePlatform("cuda", GIB, GIB), kv_cache_memory_bytes=123) == 123


def test_a_cpu_gives_half_of_what_is_free_and_4_gib_at_most() -> None:
    assert budget(FakePlatform("cpu", 2 * GIB, 64 * GIB)) == GIB
    assert budget(FakePlatform("cpu", 60 * GIB, 64 * GIB)) == 4 * GIB


def test_mapped_weights_count_although_the_system_calls_their_pages_free() -> None:
    assert budget(FakePlatform("cpu", 3 * GIB, 64 * GIB), reserve=2 * GIB) == GIB // 2
    assert budget(FakePlatform("cpu", 60 * GIB, 64 * GIB), reserve=2 * GIB) == 4 * GIB


def test_a_gpu_gives_what_is_left() -> None:
    platform = FakePlatform("cuda", free=60 * GIB, total=80 * GIB)
    assert budget(platform, 5 * GIB) == pytest.approx(60 * GIB - 5 * GIB - 8 * GIB, abs=1)


def test_count_blocks() -> None:
    assert count_blocks(CACHE, 1000, 100) == 10
    assert count_blocks(CACHE, 200, 100) == 2
    override = dataclasses.replace(CACHE, num_blocks_override=7)
    assert count_blocks(override, 0, 100) == 8  # the padding block comes on top


@pytest.mark.parametrize("num_bytes", [199, 0, -5 * GIB])
def test_too_little_for_one_block_is_an_error(num_bytes: int) -> None:
    with pytest.raises(ConfigError, match=r"one block of 16 tokens takes 100\b"):
        count_blocks(CACHE, num_bytes, 100)


def test_shrinking_ends_at_the_first_size_that_fits() -> None:
    tried: list[int] = []

    def allocate(num_blocks: int) -> None:
        tried.append(num_blocks)
        if num_blocks > 85:
            raise torch.OutOfMemoryError("no")

    assert shrink_until_it_fits(100, allocate) == 81
    assert tried == [100, 90, 81]


def test_shrinking_gives_up() -> None:
    def allocate(num_blocks: int) -> None:
        raise torch.OutOfMemoryError("no")

    with pytest.raises(ConfigError, match="no memory left"):
        shrink_until_it_fits(100, allocate)


def spec(num_kv_heads: int, head_dim: int) -> AttentionSpec:
    return AttentionSpec(num_heads=8, num_kv_heads=num_kv_heads, head_dim=head_dim, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cache_is_as_large_as_was_counted_and_zero(dtype: torch.dtype) -> None:
    specs = [spec(2, 8), spec(4, 16)]  # layers may differ
    layers = allocate_kv(specs, 5, 16, dtype, torch.device("cpu"))
    tensors = [tensor for layer in layers for tensor in (layer.k, layer.v)]
    assert [tuple(t.shape) for t in tensors] == [(5, 16, 2, 8)] * 2 + [(5, 16, 4, 16)] * 2
    assert all(t.dtype == dtype and not t.any() for t in tensors)
    assert sum(t.numel() * t.element_size() for t in tensors) == 5 * block_bytes(specs, 16, dtype)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 64, 65, 100, 256, 300, 512, 513, 1000, 1024])
def test_the_ladder_ascends_and_covers_every_batch(most: int) -> None:
    ladder = batch_ladder(most)
    assert ladder[0] == 1
    assert ladder[-1] == most
    assert list(ladder) == sorted(set(ladder))
    for size in range(1, most + 1):
        padded = next(step for step in ladder if step >= size)
        assert padded - size < 8 if size <= 64 else padded <= 1.25 * size
