"""Attention of many sequences' newest tokens over the first keys that all of them share.

Where a prompt's beginning is common to a batch (a system prompt, a document), its blocks are the
same in every block table. Read once per sequence they are most of a decode step's bytes; here
they are read once for all, as one matrix product of all members' queries with the common keys:
4 x num_members x num_heads x head_dim x length flops. The decode kernel goes on from there with the
keys that each sequence has to itself, and adds both up.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from octavo.kernels import launch
from octavo.kernels.paged_decode_triton import SharedPart, softcapped


class SharedConfig(NamedTuple):
    rows: int  # queries times heads per KV head
    block_n: int  # keys per iteration
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["num_seqs"])
def shared_kernel(
    query_ptr,  # [num_seqs, num_heads, head_dim] contiguous
    k_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_ptr,  # as k
    table_ptr,  # [max_blocks] int32
    lens_ptr,  # [num_seqs] int32: 0 or the common length
    length_ptr,  # [1] int32: the common length
    partial_ptr,  # [num_splits, num_seqs, num_heads, DIM] float32, out
    sums_ptr,  # [num_splits, 2, num_seqs, num_heads] float32, out
    num_seqs,
    k_block_stride,
    k_slot_stride,
    v_block_stride,
    v_slot_stride,
    head_dim,
    scale,
    softcap,
    GROUP: tl.constexpr,  # query heads per KV head
    SEQS: tl.constexpr,  # per program
    ROWS: tl.constexpr,  # at least SEQS * GROUP
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_heads = tl.num_programs(1) * GROUP
    rows = tl.arange(0, ROWS)
    seqs = tl.program_id(0) * SEQS + rows // GROUP
    exists = (rows < SEQS * GROUP) & (seqs < num_seqs)
    dims = tl.arange(0, DIM)
    in_dim = dims < head_dim
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    length = tl.load(length_ptr)
    is_member = tl.load(lens_ptr + seqs, mask=exists, other=0) > 0
    if tl.max(is_member.to(tl.int32), 0) == 0:
        return
    heads = kv_head * GROUP + rows % GROUP
    lines = seqs.to(tl.int64) * num_heads + heads
    mask = is_member[:, None] & in_dim[None, :]
    query = tl.load(query_ptr + lines[:, None] * head_dim + dims[None, :], mask=mask, other=0.0)
    split_len = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), BLOCK_N) * BLOCK_N
    start = split * split_len
    stop = tl.minimum(start + split_len, length)
    highest = tl.full([ROWS], -1.0e30, tl.float32)  # finite: a split may be empty
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    k_head = k_ptr + kv_head * head_dim + dims
    v_head = v_ptr + kv_head * head_dim + dims
    for n in tl.range(start, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        present = keys < stop
        block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        offset = keys % BLOCK_SIZE
        there = present[:, None] & in_dim[None, :]
        k_rows = (block * k_block_stride + offset * k_slot_stride)[:, None]
        v_rows = (block * v_block_stride + offset * v_slot_stride)[:, None]
        k = tl.load(k_head[None, :] + k_rows, mask=there, other=0.0).to(query.dtype)
        v = tl.load(v_head[None, :] + v_rows, mask=there, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcapped(scores, softcap)
        scores = tl.where(present[None, :], scores * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        highest = higher
    out = partial_ptr + (split.to(tl.int64) * num_seqs * num_heads + lines)[:, None] * DIM
    tl.store(out + dims[None, :], acc, mask=is_member[:, None])
    sums = sums_ptr + split.to(tl.int64) * 2 * num_seqs * num_heads + lines
    tl.store(sums, highest, mask=is_member)
    tl.store(sums + num_seqs * num_heads, total, mask=is_member)


def choose_config(row_bytes: int) -> SharedConfig:
    """By the bytes of a key, padded. On an H100, 256 sequences with 2,048 keys in common: 35 us a
    layer of Qwen3 8B, where the decode kernel alone takes 256 us longer than with its help.
    """
    return SharedConfig(32, 32, 4, 2) if row_bytes > 256 else SharedConfig(64, 64, 4, 3)


def attend_shared(
    query: torch.Tensor,  # [num_seqs, num_heads, head_dim] contiguous
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,
    table: torch.Tensor,  # [max_blocks] int32, contiguous: the blocks of the common keys
    lens: torch.Tensor,  # [num_seqs] int32: the common length, 0 for those who do not take part
    length: torch.Tensor,  # [1] int32: the common length
    *,
    scale: float,
    softcap: float | None = None,
) -> SharedPart:
    """The members' sums over the common keys, for `paged_decode`. A member has further keys."""
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group, dim = num_heads // num_kv_heads, triton.next_power_of_2(head_dim)
    config = choose_config(dim * query.element_size())
    rows = max(config.rows, triton.next_power_of_2(group))
    seqs = rows // group
    num_tiles = triton.cdiv(num_seqs, seqs)
    processors = launch.num_processors(query.device)
    num_splits = min(max(2 * processors // (num_tiles * num_kv_heads), 1), 8)
    how: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    partial = torch.empty((num_splits, num_seqs, num_heads, dim), **how)
    sums = torch.empty((num_splits, 2, num_seqs, num_heads), **how)
    overlap = launch.overlaps(query)
    shared_kernel[(num_tiles, num_kv_heads, num_splits)](
        query,
        k_cache,
        v_cache,
        table,
        lens,
        length,
        partial,
        sums,
        num_seqs,
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        head_dim,
        scale,
        softcap or 0.0,
        GROUP=group,
        SEQS=seqs,
        ROWS=rows,
        DIM=dim,
        BLOCK_SIZE=block_size,
        BLOCK_N=config.block_n,
        HAS_SOFTCAP=softcap is not None,
        OVERLAP=overlap,
        **launch.options(overlap, config.num_warps, config.num_stages),
    )
    return SharedPart(lens, partial, sums, num_splits)
