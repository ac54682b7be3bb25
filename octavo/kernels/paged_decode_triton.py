"""Paged attention of one query token per sequence, the context cut into splits (flash-decoding).

Moves: every visible key and value once, 4 x sum(seq_lens) x num_kv_heads x head_dim bytes in a
16-bit cache; all else is small. So it is bound by memory, as long as there are enough programs to
keep all processors reading: one per sequence, KV head and split. The query heads that share a KV
head are the rows of one matrix product.

The number of splits is fixed by the launch; how many of them a sequence really uses, and how long
they are, each program works out from the sequence's length on the device. The rest exit at once.
The split that finishes last adds up all of them, so that there is no second launch.

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

LOG2_E = 1.4426950408889634
# A split is at least so long: below, starting a program costs more than what it reads.
MIN_SPLIT_LEN = 128
# ... and a sequence is cut at least so finely, lest one long context among short ones be a tail.
MAX_SPLIT_LEN = 32768
# Programs per processor to aim at.
PROGRAMS_PER_PROCESSOR = 2


class DecodeConfig(NamedTuple):
    block_n: int  # keys per iteration
    num_warps: int
    num_stages: int


@triton.jit
def softcapped(scores, softcap):
    """cap * tanh(scores / cap)"""
    return softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)


@triton.jit
def decode_kernel(
    query_ptr,  # [num_seqs, num_heads, head_dim] contiguous
    out_ptr,  # as query
    k_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_ptr,  # as k
    table_ptr,  # [num_seqs, max_blocks] int32, rows table_stride apart
    seq_lens_ptr,  # [num_seqs] int32
    partial_ptr,  # [num_seqs * num_kv_heads * num_splits, ROWS, DIM] float32
    sums_ptr,  # [num_seqs * num_kv_heads * num_splits, 2, ROWS] float32: maximum, sum
    arrived_ptr,  # [num_seqs * num_kv_heads] int32, zero before and after
    table_stride,
    k_block_stride,
    k_slot_stride,
    v_block_stride,
    v_slot_stride,
    head_dim,
    window,
    scale,  # of the scores
    softcap,
    GROUP: tl.constexpr,  # query heads per KV head
    ROWS: tl.constexpr,  # GROUP, padded to what a matrix product takes
    DIM: tl.constexpr,  # head_dim, padded to a power of two
    EVEN_DIM: tl.constexpr,  # whether it is one already
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPLIT: tl.constexpr,  # whether there is more than one split
    MAX_SPLITS: tl.constexpr,  # number of splits, padded to a power of two
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_kv_heads = tl.num_programs(1)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seq_len = tl.load(seq_lens_ptr + seq)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(seq_len - window, 0)
    num_keys = seq_len - first
    start = first
    stop = seq_len
    num_used = 1
    if SPLIT:
        split_len = tl.cdiv(tl.cdiv(num_keys, tl.num_programs(2)), BLOCK_N) * BLOCK_N
        split_len = tl.maximum(split_len, MIN_SPLIT)
        num_used = tl.maximum(tl.cdiv(num_keys, split_len), 1)
        if split >= num_used:
            return
        start = first + split * split_len
        stop = tl.minimum(start + split_len, seq_len)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    in_dim = dims < head_dim
    heads = kv_head * GROUP + rows
    query_offsets = (seq * num_kv_heads * GROUP + heads)[:, None] * head_dim + dims[None, :]
    query_mask = (rows < GROUP)[:, None] & in_dim[None, :]
    query = tl.load(query_ptr + query_offsets, mask=query_mask, other=0.0)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    table_row = table_ptr + seq * table_stride
    k_head = k_ptr + kv_head * head_dim + dims
    v_head = v_ptr + kv_head * head_dim + dims
    for n in tl.range(start, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        exists = keys < stop
        block = tl.load(table_row + keys // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        offset = keys % BLOCK_SIZE
        if EVEN_DIM:
            mask = exists[:, None]
        else:
            mask = exists[:, None] & in_dim[None, :]
        k_rows = block * k_block_stride + offset * k_slot_stride
        v_rows = block * v_block_stride + offset * v_slot_stride
        k = tl.load(k_head[None, :] + k_rows[:, None], mask=mask, other=0.0).to(query.dtype)
        v = tl.load(v_head[None, :] + v_rows[:, None], mask=mask, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcapped(scores, softcap)
        scores = tl.where(exists[None, :], scores * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        highest = higher

    if SPLIT:  # noqa: SIM102  # known at compile time
        if num_used > 1:
            pair = seq * num_kv_heads + kv_head
            here = pair * tl.num_programs(2) + split
            tile = rows[:, None] * DIM + dims[None, :]
            tl.store(partial_ptr + here * ROWS * DIM + tile, acc)
            tl.store(sums_ptr + here * 2 * ROWS + rows, highest)
            tl.store(sums_ptr + here * 2 * ROWS + ROWS + rows, total)
            tl.debug_barrier()  # all threads' stores before the count
            arrived = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu")
            if arrived != num_used - 1:
                return
            tl.debug_barrier()
            tl.store(arrived_ptr + pair, 0)
            base = pair * tl.num_programs(2)
            splits = tl.arange(0, MAX_SPLITS)
            used = (splits < num_used)[:, None]
            sums = sums_ptr + (base + splits)[:, None] * 2 * ROWS + rows[None, :]
            maxima = tl.load(sums, mask=used, other=float("-inf"), cache_modifier=".cg")
            totals = tl.load(sums + ROWS, mask=used, other=0.0, cache_modifier=".cg")
            highest = tl.max(maxima, 0)
            total = tl.sum(tl.exp2(maxima - highest[None, :]) * totals, 0)
            acc = tl.zeros([ROWS, DIM], tl.float32)
            for other in tl.range(0, num_used):
                there = base + other
                maximum = tl.load(sums_ptr + there * 2 * ROWS + rows, cache_modifier=".cg")
                part = tl.load(partial_ptr + there * ROWS * DIM + tile, cache_modifier=".cg")
                acc += part * tl.exp2(maximum - highest)[:, None]
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]  # a padding row may have length 0
    tl.store(out_ptr + query_offsets, out.to(out_ptr.dtype.element_ty), mask=query_mask)


class DecodeWorkspace:
    """Where the splits of a launch leave their partial sums. One per stream of launches: each
    finds the counters at zero and leaves them so.
    """

    def __init__(self) -> None:
        # Outgrown buffers are kept, because a captured graph may still write to them.
        self._buffers: dict[tuple[str, torch.device], list[torch.Tensor]] = {}

    def reserve(
        self, device: torch.device, num_pairs: int, num_splits: int, rows: int, dim: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(partial, sums, arrived), at least so large."""
        num_slots = num_pairs * num_splits
        return (
            self._buffer("partial", device, num_slots * rows * dim, torch.float32),
            self._buffer("sums", device, num_slots * 2 * rows, torch.float32),
            self._buffer("arrived", device, num_pairs, torch.int32),
        )

    def _buffer(
        self, name: str, device: torch.device, size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        buffers = self._buffers.setdefault((name, device), [])
        if not buffers or buffers[-1].numel() < size:
            # By powers of two, so that all that was kept is no more than what is in use.
            buffers.append(torch.zeros(triton.next_power_of_2(size), dtype=dtype, device=device))
        return buffers[-1]


def count_splits(num_seqs: int, num_kv_heads: int, max_len: int, num_processors: int) -> int:
    """Into how many parts a context of max_len keys is cut, at most."""
    target: int = triton.cdiv(PROGRAMS_PER_PROCESSOR * num_processors, num_seqs * num_kv_heads)
    fewest: int = triton.cdiv(max_len, MAX_SPLIT_LEN)
    most: int = triton.cdiv(max_len, MIN_SPLIT_LEN)
    return max(min(max(target, fewest), most, 128), 1)


def choose_config(head_dim: int, itemsize: int, is_split: bool) -> DecodeConfig:
    """By the bytes that one iteration keeps in shared memory. On an H100, head_dim 128, bfloat16:
    16 sequences x 16,384 keys in 370 us (94 % of the read ceiling) when split, 256 x 1,024 in
    361 us (96 %) when not.
    """
    row_bytes = triton.next_power_of_2(head_dim) * itemsize
    if row_bytes <= 256:
        return DecodeConfig(128, 4, 2) if is_split else DecodeConfig(64, 2, 3)
    return DecodeConfig(block_n=32, num_warps=4, num_stages=3 if row_bytes <= 512 else 2)


def paged_decode(
    query: torch.Tensor,  # [num_seqs, num_heads, head_dim] contiguous
    out: torch.Tensor,  # as query
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,  # [>= num_seqs, max_blocks] int32
    seq_lens: torch.Tensor,  # [>= num_seqs] int32; 0 and 1 are padding and do no harm
    max_seq_len: int,  # a bound that only decides how finely contexts are cut
    workspace: DecodeWorkspace,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    config: DecodeConfig | None = None,
    num_splits: int | None = None,
) -> None:
    """Attend, into `out`. The keys of the query tokens themselves are in the cache already."""
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    if not num_seqs:
        return
    group = num_heads // num_kv_heads
    rows, dim = max(triton.next_power_of_2(group), 16), triton.next_power_of_2(head_dim)
    max_len = max_seq_len if window is None else min(max_seq_len, window)
    if num_splits is None:
        processors = launch.num_processors(query.device)
        num_splits = count_splits(num_seqs, num_kv_heads, max_len, processors)
    config = config or choose_config(head_dim, k_cache.element_size(), num_splits > 1)
    num_pairs = num_seqs * num_kv_heads
    buffers = (query, query, query)
    if num_splits > 1:
        buffers = workspace.reserve(query.device, num_pairs, num_splits, rows, dim)
    overlap = launch.overlaps(query)
    decode_kernel[(num_seqs, num_kv_heads, num_splits)](
        query,
        out,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        *buffers,
        block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        head_dim,
        window or 0,
        scale,
        softcap or 0.0,
        GROUP=group,
        ROWS=rows,
        DIM=dim,
        EVEN_DIM=dim == head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_N=config.block_n,
        MIN_SPLIT=MIN_SPLIT_LEN,
        SPLIT=num_splits > 1,
        MAX_SPLITS=max(triton.next_power_of_2(num_splits), 16),
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        OVERLAP=overlap,
        **launch.options(overlap, config.num_warps, config.num_stages),
    )
