"""How much memory the KV cache gets: what is really left when everything else has been measured."""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo.config import CacheConfig
from octavo.errors import ConfigError
from octavo.log import get_logger
from octavo.platforms import Platform

logger = get_logger(__name__)

# On a CPU the cache shares memory with everything else that a person runs.
_CPU_KV_BYTES = 4 << 30
_CPU_KV_SHARE = 0.5  # of the free memory, at most
_RETRY_SHARE = 0.9  # of the former size, after running out of memory
_MAX_RETRIES = 8


def kv_budget_bytes(config: CacheConfig, platform: Platform, reserve_bytes: int) -> int:
    """Bytes for the KV cache, as asked for or as left over.

    Args:
        reserve_bytes: what will be needed besides: activations of the largest step, graphs, on a
            CPU weights that are mapped.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    free = platform.memory_free_bytes()
    if platform.torch_device.type == "cpu":
        return min(_CPU_KV_BYTES, int((free - reserve_bytes) * _CPU_KV_SHARE))
    total = platform.info().total_memory_bytes
    return free - reserve_bytes - int(total * (1.0 - config.gpu_memory_utilization))


def count_blocks(config: CacheConfig, budget_bytes: int, block_bytes: int) -> int:
    """Blocks to allocate; block 0, which is padding, included.

    Raises:
        ConfigError: not even one block fits.
    """
    if config.num_blocks_override is not None:
        return config.num_blocks_override + 1
    if budget_bytes < 2 * block_bytes:
        raise ConfigError(
            f"The KV cache would have {max(budget_bytes, 0):,} bytes, and one block of "
            f"{config.block_size} tokens takes {block_bytes:,}. Raise gpu_memory_utilization or "
            "kv_cache_memory_bytes, or use a smaller model or dtype."
        )
    return budget_bytes // block_bytes


def shrink_until_it_fits(num_blocks: int, allocate: Callable[[int], None]) -> int:
    """Call `allocate(num_blocks)` with fewer and fewer blocks while memory runs out.

    Returns the number that fitted. Raises ConfigError when even a small cache does not.
    """
    for _ in range(_MAX_RETRIES):
        try:
            allocate(num_blocks)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            smaller = max(2, int(num_blocks * _RETRY_SHARE))
            logger.warning("no room for %d KV blocks, trying %d", num_blocks, smaller)
            num_blocks = smaller
        else:
            return num_blocks
    raise ConfigError(
        "The device has no memory left for a KV cache: another process may be using it. "
        "Lower gpu_memory_utilization or max_num_batched_tokens."
    )
