"""Paged attention of chunks of queries, each behind a context of any length (flash attention).

Flops: 4 x head_dim per query head and visible key. Each program takes BLOCK_M rows: some query
tokens of one sequence times all heads that share a KV head, so that K and V are never repeated and
few keys are partly masked. Blocks of keys that every row sees skip the mask.

Which sequence a program belongs to it finds by binary search over query_starts, so the grid
depends only on the numbers of tokens and sequences.

The plain twin is `octavo.attention.torch_backend`.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from octavo.kernels import launch
from octavo.kernels.paged_decode_triton import softcapped


class PrefillConfig(NamedTuple):
    block_m: int  # rows: query tokens times heads per KV head
    block_n: int  # keys per iteration
    num_warps: int
    num_stages: int


@triton.jit
def find_sequence(starts_ptr, num_seqs, tile, BLOCK_Q: tl.constexpr):
    """The sequence that the tile belongs to: the last one whose first tile is not beyond it.

    Sequence i's tiles start at (tokens before it) // BLOCK_Q + i: no two overlap, and some are
    empty.
    """
    base = tl.load(starts_ptr)
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        first_tile = (tl.load(starts_ptr + middle) - base) // BLOCK_Q + middle
        if first_tile <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _attend(
    acc,
    total,
    highest,
    query,
    positions,  # [ROWS] of the queries
    start,
    stop,
    seq_len,
    k_head,
    v_head,
    table_row,
    k_block_stride,
    k_slot_stride,
    v_block_stride,
    v_slot_stride,
    in_dim,
    window,
    scale,  # with softcap: of the scores; without: times log2(e)
    softcap,
    EVEN_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take in the keys [start, stop), which start at a multiple of BLOCK_N. Not MASKED: a whole
    number of blocks, every key of which every query sees.
    """
    for n in tl.range(start, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        if MASKED:
            block = tl.load(table_row + keys // BLOCK_SIZE, mask=keys < seq_len, other=0)
            exists = (keys < seq_len)[:, None]
            if not EVEN_DIM:
                exists = exists & in_dim[None, :]
        else:
            block = tl.load(table_row + keys // BLOCK_SIZE)
            exists = in_dim[None, :]
        block = block.to(tl.int64)
        k_rows = (block * k_block_stride + (keys % BLOCK_SIZE) * k_slot_stride)[:, None]
        v_rows = (block * v_block_stride + (keys % BLOCK_SIZE) * v_slot_stride)[:, None]
        if MASKED or not EVEN_DIM:
            k = tl.load(k_head[None, :] + k_rows, mask=exists, other=0.0).to(query.dtype)
            v = tl.load(v_head[None, :] + v_rows, mask=exists, other=0.0).to(query.dtype)
        else:
            k = tl.load(k_head[None, :] + k_rows).to(query.dtype)
            v = tl.load(v_head[None, :] + v_rows).to(query.dtype)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcapped(scores, softcap) * 1.4426950408889634
        if MASKED:
            visible = keys[None, :] <= positions[:, None]
            if HAS_WINDOW:
                visible = visible & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        if HAS_WINDOW and MASKED:
            # A row may not have seen any key yet.
            base = tl.where(higher == float("-inf"), 0.0, higher)
        else:
            base = higher
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        highest = higher
    return acc, total, highest


@triton.jit(
    do_not_specialize=["num_seqs", "table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "starts_ptr", "seq_lens_ptr"],
)
def prefill_kernel(
    query_ptr,  # [num_tokens, num_heads, head_dim] contiguous
    out_ptr,  # as query
    k_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_ptr,  # as k
    table_ptr,  # [num_seqs, max_blocks] int32, rows table_stride apart
    starts_ptr,  # [num_seqs + 1] int32, token indices
    seq_lens_ptr,  # [num_seqs] int32
    num_seqs,
    table_stride,
    k_block_stride,
    k_slot_stride,
    v_block_stride,
    v_slot_stride,
    head_dim,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,  # query heads per KV head
    BLOCK_Q: tl.constexpr,  # query tokens per program: ROWS // GROUP
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # The last tiles of a chunk see the most keys: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seq = find_sequence(starts_ptr, num_seqs, tile, BLOCK_Q)
    chunk_start = tl.load(starts_ptr + seq)
    query_len = tl.load(starts_ptr + seq + 1) - chunk_start
    first_query = (tile - (chunk_start - tl.load(starts_ptr)) // BLOCK_Q - seq) * BLOCK_Q
    if first_query >= query_len:
        return
    seq_len = tl.load(seq_lens_ptr + seq)
    rows = tl.arange(0, ROWS)
    queries = first_query + rows // GROUP
    dims = tl.arange(0, DIM)
    in_dim = dims < head_dim
    exists = (queries < query_len) & (rows < BLOCK_Q * GROUP)
    tokens = (chunk_start + queries).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    offsets = (tokens * num_heads + heads)[:, None] * head_dim + dims[None, :]
    mask = exists[:, None] & in_dim[None, :]
    query = tl.load(query_ptr + offsets, mask=mask, other=0.0)
    context_len = seq_len - query_len
    lowest_position = context_len + first_query
    last_query = tl.minimum(first_query + BLOCK_Q, query_len) - 1
    highest_position = context_len + last_query
    # Rows beyond the chunk repeat its last query: no row may be without a key.
    positions = tl.minimum(context_len + queries, highest_position)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    k_head = k_ptr + kv_head * head_dim + dims
    v_head = v_ptr + kv_head * head_dim + dims
    table_row = table_ptr + seq.to(tl.int64) * table_stride
    # Keys [0, full_stop) are seen by all queries, but for the window; [full_stop, stop) by some.
    full_stop = (lowest_position + 1) // BLOCK_N * BLOCK_N
    start = 0
    if HAS_WINDOW:
        # [start, full_start): some rows' windows have begun later.
        start = tl.maximum(lowest_position - window + 1, 0) // BLOCK_N * BLOCK_N
        full_start = tl.maximum(highest_position - window + 1, 0)
        full_start = tl.cdiv(full_start, BLOCK_N) * BLOCK_N
        full_stop = tl.maximum(full_stop, start)
        full_start = tl.minimum(full_start, full_stop)
        acc, total, highest = _attend(
            acc, total, highest, query, positions, start, full_start, seq_len, k_head, v_head,
            table_row, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, in_dim,
            window, scale, softcap, EVEN_DIM, BLOCK_SIZE, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, True,
        )  # fmt: skip
        start = full_start
    acc, total, highest = _attend(
        acc, total, highest, query, positions, start, full_stop, seq_len, k_head, v_head,
        table_row, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, in_dim,
        window, scale, softcap, EVEN_DIM, BLOCK_SIZE, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, False,
    )  # fmt: skip
    acc, total, highest = _attend(
        acc, total, highest, query, positions, full_stop, highest_position + 1, seq_len, k_head,
        v_head, table_row, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, in_dim,
        window, scale, softcap, EVEN_DIM, BLOCK_SIZE, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, True,
    )  # fmt: skip
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


def choose_config(head_dim: int, itemsize: int, max_rows: int) -> PrefillConfig:
    """By what fits registers and shared memory; `max_rows`: rows of the longest chunk."""
    dim = triton.next_power_of_2(head_dim)
    if itemsize == 4:
        return PrefillConfig(32, 32, 4, 2)
    if max_rows <= 64:
        return PrefillConfig(64 if max_rows > 16 else 16, 64, 4, 2 if dim > 128 else 3)
    if launch.is_amd():
        return PrefillConfig(64, 32, 4, 1) if dim > 128 else PrefillConfig(128, 64, 8, 2)
    if dim > 128:
        return PrefillConfig(128, 64, 8, 2)
    # On an H100, head_dim 128: 413 TFLOP/s at 16,384 tokens, 253 at one chunk of 2,048.
    return PrefillConfig(128, 128, 8, 3)


def paged_prefill(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim] contiguous
    out: torch.Tensor,  # as query
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,  # [num_seqs, max_blocks] int32
    query_starts: torch.Tensor,  # [num_seqs + 1] int32, indices into query
    seq_lens: torch.Tensor,  # [num_seqs] int32
    num_query_tokens: int,  # of these sequences together
    max_query_len: int,  # a bound that only decides the shape of a tile
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    config: PrefillConfig | None = None,
) -> None:
    """Attend causally, into `out`. The chunks' own keys and values are in the cache already."""
    num_heads, head_dim = query.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_seqs = len(seq_lens)
    group = num_heads // num_kv_heads
    config = config or choose_config(head_dim, query.element_size(), max_query_len * group)
    rows = max(config.block_m, triton.next_power_of_2(group))
    block_q = rows // group
    dim = triton.next_power_of_2(head_dim)
    overlap = launch.overlaps(query)
    prefill_kernel[(num_query_tokens // block_q + num_seqs, num_kv_heads)](
        query,
        out,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        seq_lens,
        num_seqs,
        block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        head_dim,
        window or 0,
        scale if softcap is not None else scale * 1.4426950408889634,
        softcap or 0.0,
        GROUP=group,
        BLOCK_Q=block_q,
        ROWS=rows,
        DIM=dim,
        EVEN_DIM=dim == head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_N=config.block_n,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        OVERLAP=overlap,
        **launch.options(overlap, config.num_warps, config.num_stages),
    )
