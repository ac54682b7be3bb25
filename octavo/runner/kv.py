"""The KV cache's device memory: how large a block is, how many fit, and the tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from octavo.attention.base import AttentionSpec, KVLayer

_ITEM_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def block_bytes(specs: Sequence[AttentionSpec], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    per_token = sum(2 * spec.num_kv_heads * spec.head_dim for spec in specs)
    return per_token * block_size * _ITEM_BYTES[dtype]


def allocate_kv(
    specs: Sequence[AttentionSpec],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[KVLayer, ...]:
    """One zeroed cache per layer. Zeroed, because masked positions are still multiplied by 0, and
    0 * NaN is NaN. On a CPU, pages cost memory only once they are written to.
    """
    return tuple(
        KVLayer(
            *(
                _zeros((num_blocks, block_size, spec.num_kv_heads, spec.head_dim), dtype, device)
                for _ in range(2)
            )
        )
        for spec in specs
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * _ITEM_BYTES[dtype]
    # numpy asks for zeroed pages, torch.zeros writes them: seconds for gigabytes.
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
