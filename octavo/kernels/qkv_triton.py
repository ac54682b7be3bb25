"""Norm per head, rotation and cache write in one launch. See `octavo.kernels.qkv`."""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels import launch
from octavo.kernels.qkv import HeadTransform

WIDE = 16, 4  # heads and warps of a program where there are many tokens


@triton.jit
def _head_weight(q_norm_ptr, k_norm_ptr, is_query, dims, stop):
    """[heads, dims]: the weight of each head's norm."""
    q_weight = tl.load(q_norm_ptr + dims, mask=dims < stop, other=0.0).to(tl.float32)
    k_weight = tl.load(k_norm_ptr + dims, mask=dims < stop, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], q_weight[None, :], k_weight[None, :])


@triton.jit(do_not_specialize=["keep"])
def qkv_kernel(
    qkv_ptr,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], rows qkv_stride apart
    query_ptr,  # [num_tokens, num_heads, head_dim] contiguous
    k_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_ptr,  # as k
    slots_ptr,  # [num_tokens]
    positions_ptr,  # [num_tokens]
    table_ptr,  # [max_model_len, 2 * half] float32: cos, then sin
    q_norm_ptr,  # [head_dim]
    k_norm_ptr,  # [head_dim]
    qkv_stride,
    k_block_stride,
    k_slot_stride,
    v_block_stride,
    v_slot_stride,
    num_heads,
    num_kv_heads,
    half,  # of the rotated part
    head_dim,
    block_size,
    eps,
    keep,  # 1: keys also back to qkv, where padding's keys and values become 0
    HAS_NORM: tl.constexpr,
    ADD_ONE: tl.constexpr,
    HEADS: tl.constexpr,  # per program
    HALF: tl.constexpr,  # half, rounded up to a power of two
    TAIL: tl.constexpr,  # head_dim - 2 * half, likewise; 0: there is none
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_query = head < num_heads
    is_value = head >= num_heads + num_kv_heads
    exists = head < num_heads + 2 * num_kv_heads
    dims = tl.arange(0, HALF)
    in_half = exists[:, None] & (dims < half)[None, :]
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    angle_ptr = table_ptr + position * 2 * half + dims
    cos = tl.load(angle_ptr, mask=dims < half, other=0.0)[None, :]
    sin = tl.load(angle_ptr + half, mask=dims < half, other=0.0)[None, :]
    source = qkv_ptr + token * qkv_stride + head[:, None] * head_dim
    raw_first = tl.load(source + dims[None, :], mask=in_half, other=0.0)
    raw_second = tl.load(source + half + dims[None, :], mask=in_half, other=0.0)
    dtype = raw_first.dtype
    first = raw_first.to(tl.float32)
    second = raw_second.to(tl.float32)
    if TAIL > 0:
        tail_dims = 2 * half + tl.arange(0, TAIL)
        in_tail = exists[:, None] & (tail_dims < head_dim)[None, :]
        raw_tail = tl.load(source + tail_dims[None, :], mask=in_tail, other=0.0)
        tail = raw_tail.to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        if TAIL > 0:
            squares += tl.sum(tail * tail, axis=1)
        scale = tl.rsqrt(squares / head_dim + eps)[:, None]
        first_weight = _head_weight(q_norm_ptr, k_norm_ptr, is_query, dims, half)
        second_weight = _head_weight(q_norm_ptr, k_norm_ptr, is_query, half + dims, 2 * half)
        first *= scale
        second *= scale
        if ADD_ONE:
            first *= 1.0 + first_weight
            second *= 1.0 + second_weight
        else:
            first = first.to(dtype).to(tl.float32) * first_weight
            second = second.to(dtype).to(tl.float32) * second_weight
        first = first.to(dtype).to(tl.float32)
        second = second.to(dtype).to(tl.float32)
        if TAIL > 0:
            tail_weight = _head_weight(q_norm_ptr, k_norm_ptr, is_query, tail_dims, head_dim)
            tail *= scale
            if ADD_ONE:
                tail *= 1.0 + tail_weight
            else:
                tail = tail.to(dtype).to(tl.float32) * tail_weight
    out_first = tl.where(is_value[:, None], raw_first, (first * cos - second * sin).to(dtype))
    out_second = tl.where(is_value[:, None], raw_second, (second * cos + first * sin).to(dtype))

    # Where each head goes: the queries, or its slot in either cache.
    query_row = query_ptr + (token * num_heads + head)[:, None] * head_dim
    block = slot // block_size
    offset = slot % block_size
    kv_head = (head - num_heads)[:, None]
    k_row = k_ptr + block * k_block_stride + offset * k_slot_stride + kv_head * head_dim
    kv_head -= num_kv_heads
    v_row = v_ptr + block * v_block_stride + offset * v_slot_stride + kv_head * head_dim
    to_query = is_query[:, None] & in_half
    to_key = (~is_query & ~is_value)[:, None] & in_half
    to_value = is_value[:, None] & in_half
    kv_type: tl.constexpr = k_ptr.dtype.element_ty
    tl.store(query_row + dims[None, :], out_first, mask=to_query)
    tl.store(query_row + half + dims[None, :], out_second, mask=to_query)
    tl.store(k_row + dims[None, :], out_first.to(kv_type), mask=to_key)
    tl.store(k_row + half + dims[None, :], out_second.to(kv_type), mask=to_key)
    tl.store(v_row + dims[None, :], out_first.to(kv_type), mask=to_value)
    tl.store(v_row + half + dims[None, :], out_second.to(kv_type), mask=to_value)
    is_padding = slot < block_size  # block 0 belongs to nobody
    to_keep = (to_key | (to_value & is_padding)) & (keep == 1)
    tl.store(source + dims[None, :], tl.where(is_padding, 0.0, out_first), mask=to_keep)
    tl.store(source + half + dims[None, :], tl.where(is_padding, 0.0, out_second), mask=to_keep)
    if TAIL > 0:
        out_tail = tl.where(is_value[:, None], raw_tail, tail.to(dtype))
        tl.store(query_row + tail_dims[None, :], out_tail, mask=is_query[:, None] & in_tail)
        to_key = (~is_query & ~is_value)[:, None] & in_tail
        tl.store(k_row + tail_dims[None, :], out_tail.to(kv_type), mask=to_key)
        to_value = is_value[:, None] & in_tail
        tl.store(v_row + tail_dims[None, :], out_tail.to(kv_type), mask=to_value)
        to_keep = (to_key | (to_value & is_padding)) & (keep == 1)
        tl.store(source + tail_dims[None, :], tl.where(is_padding, 0.0, out_tail), mask=to_keep)


def rotate_and_store(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    num_heads: int,
    transform: HeadTransform,
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,  # [num_tokens] int64
    *,
    keep: bool = False,
) -> torch.Tensor:  # queries [num_tokens, num_heads, head_dim]
    """Rotated queries; keys and values go to their slots. With `keep`, qkv holds the finished keys
    as well, and zeros for tokens whose slot is in block 0.
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_tokens, rope, norms = len(qkv), transform.rope, transform.norms
    query = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if not num_tokens:
        return query
    overlap = launch.overlaps(qkv)
    half = rope.table.shape[1] // 2
    # Few tokens: two heads per program, for more programs; many: wider ones.
    heads, num_warps = (2, 1) if num_tokens <= 16 else WIDE
    qkv_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads))](
        qkv,
        query,
        k_cache,
        v_cache,
        slot_mapping,
        rope.positions,
        rope.table,
        qkv if norms is None else norms.query,
        qkv if norms is None else norms.key,
        qkv.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        num_heads,
        num_kv_heads,
        half,
        head_dim,
        k_cache.shape[1],
        0.0 if norms is None else norms.eps,
        int(keep),
        HAS_NORM=norms is not None,
        ADD_ONE=norms is not None and norms.add_one,
        HEADS=heads,
        HALF=triton.next_power_of_2(half),
        TAIL=triton.next_power_of_2(head_dim - 2 * half) if head_dim > 2 * half else 0,
        OVERLAP=overlap,
        **launch.options(overlap, num_warps),
    )
    return query
