"""From the packed q-k-v projection to rotated queries and filled cache slots.

Moves: the projection in, queries and cache slots out (2 x num_tokens x (H + 2 Hk) x head_dim
elements), and 4 x rot_dim bytes of the table per token. Queries and keys may be normed per head
before the rotation (Qwen3, Gemma 3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from octavo.kernels.norm import rms_norm
from octavo.kernels.rope import Rope, rotate


class HeadNorms(NamedTuple):
    """RMSNorms over head_dim, for queries and for keys."""

    query: torch.Tensor  # [head_dim]
    key: torch.Tensor  # [head_dim]
    eps: float
    add_one: bool


class HeadTransform(NamedTuple):
    """What happens to a layer's queries and keys between projection and attention."""

    rope: Rope
    norms: HeadNorms | None


class QKV(NamedTuple):
    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    key: torch.Tensor  # [num_tokens, num_kv_heads, head_dim]
    value: torch.Tensor  # [num_tokens, num_kv_heads, head_dim]


def split_and_rotate(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    num_heads: int,
    num_kv_heads: int,
    transform: HeadTransform,
) -> QKV:
    """The plain steps; `qkv` may be overwritten."""
    rope, norms = transform
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, -1)
    num_rotated = num_heads + num_kv_heads
    value = heads[:, num_rotated:]
    if norms is None:
        # Queries and keys lie side by side: one rotation for both.
        rotated = rotate(heads[:, :num_rotated], rope.cos, rope.sin)
        return QKV(rotated[:, :num_heads], rotated[:, num_heads:], value)
    query, _ = rms_norm(heads[:, :num_heads], norms.query, norms.eps, add_one=norms.add_one)
    key, _ = rms_norm(heads[:, num_heads:num_rotated], norms.key, norms.eps, add_one=norms.add_one)
    return QKV(rotate(query, rope.cos, rope.sin), rotate(key, rope.cos, rope.sin), value)


def rotate_and_store_torch(
    qkv: torch.Tensor,
    num_heads: int,
    transform: HeadTransform,
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,  # [num_tokens] int64
) -> torch.Tensor:  # queries [num_tokens, num_heads, head_dim]
    """The twin of `qkv_triton.rotate_and_store`."""
    query, key, value = split_and_rotate(qkv, num_heads, k_cache.shape[2], transform)
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slot_mapping, key.to(k_cache.dtype))
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slot_mapping, value.to(v_cache.dtype))
    return query
