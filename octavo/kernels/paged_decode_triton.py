"""Paged attention of one query token per sequence, the context cut into splits (flash-decoding).

Moves: every visible key and value once, 4 x sum(seq_lens) x num_kv_heads x head_dim bytes in a
16-bit cache; all else is small. So it is bound by memory, as long as there are enough programs to
keep all processors reading: one per sequence, KV head and split. The query heads that share a KV
head are the rows of one matrix product.

The number of splits is fixed by the launch; how many of them a sequence really uses, and how long
they are, each program works out from the sequence's length on the device. The rest exit at once.
The split that finishes last adds up all of them, so that there is no second launch. It also adds
what `shared_prefix_triton` has found for the keys that many sequences have in common.

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
# The same where uncut contexts would make as many programs as are wanted, half, a third, a quarter
# of them: only those that are long among others are cut, lest they be a tail.
SPLIT_LENS = {1: 1024, 2: 512, 3: 512, 4: 256}
# Contexts may be cut into so many parts even where sequences fill the GPU, ...
FEW_SPLITS = 8
# ... as long as there are no more parts than this in all: each takes memory.
MAX_PARTS = 4096
MOST_SPLITS = 64
# Programs per processor to aim at.
PROGRAMS_PER_PROCESSOR = 2


class DecodeConfig(NamedTuple):
    block_n: int  # keys per iteration
    num_warps: int
    num_stages: int


class Splits(NamedTuple):
    """How contexts are cut."""

    most: int  # parts
    min_len: int  # keys of a part


class SharedPart(NamedTuple):
    """Sums over the keys that sequences have in common; see `shared_prefix_triton`."""

    lens: torch.Tensor  # [num_seqs] int32: how many of each sequence's first keys are in the sums
    partial: torch.Tensor  # [num_splits, num_seqs, num_heads, DIM] float32
    sums: torch.Tensor  # [num_splits, 2, num_seqs, num_heads] float32: maximum, sum
    num_splits: int


@triton.jit
def softcapped(scores, softcap):
    """cap * tanh(scores / cap)"""
    return softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)


@triton.jit(do_not_specialize=["table_stride", "shared_splits"])
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
    shared_lens_ptr,  # SharedPart
    shared_partial_ptr,
    shared_sums_ptr,
    shared_splits,
    table_stride,
    k_block_stride,
    k_slot_stride,
    v_block_stride,
    v_slot_stride,
    head_dim,
    min_split,
    window,
    scale,  # of the scores
    softcap,
    GROUP: tl.constexpr,  # query heads per KV head
    ROWS: tl.constexpr,  # GROUP, padded to what a matrix product takes
    DIM: tl.constexpr,  # head_dim, padded to a power of two
    EVEN_DIM: tl.constexpr,  # whether it is one already
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,  # whether there is more than one split
    MAX_SPLITS: tl.constexpr,  # a power of two, no less than the splits
    HAS_SHARED: tl.constexpr,
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
    if seq_len == 0:
        return
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(seq_len - window, 0)
    if HAS_SHARED:
        first = tl.load(shared_lens_ptr + seq)
    num_keys = seq_len - first
    start = first
    stop = seq_len
    num_used = 1
    if SPLIT:
        num_used = tl.minimum(tl.cdiv(num_keys, min_split), tl.num_programs(2))
        split_len = tl.cdiv(tl.cdiv(num_keys, num_used), BLOCK_N) * BLOCK_N
        num_used = tl.cdiv(num_keys, split_len)
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
            is_head = rows < GROUP
            tl.store(partial_ptr + here * ROWS * DIM + tile, acc, mask=is_head[:, None])
            tl.store(sums_ptr + here * 2 * ROWS + rows, highest, mask=is_head)
            tl.store(sums_ptr + here * 2 * ROWS + ROWS + rows, total, mask=is_head)
            tl.debug_barrier()  # all threads' stores before the count
            arrived = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu")
            if arrived != num_used - 1:
                return
            tl.debug_barrier()
            tl.store(arrived_ptr + pair, 0)
            base = pair * tl.num_programs(2)
            splits = tl.arange(0, MAX_SPLITS)
            used = (splits < num_used)[:, None] & is_head[None, :]
            sums = sums_ptr + (base + splits)[:, None] * 2 * ROWS + rows[None, :]
            maxima = tl.load(sums, mask=used, other=float("-inf"), cache_modifier=".cg")
            totals = tl.load(sums + ROWS, mask=used, other=0.0, cache_modifier=".cg")
            highest = tl.max(maxima, 0)
            total = tl.sum(tl.exp2(maxima - highest[None, :]) * totals, 0)
            acc = tl.zeros([ROWS, DIM], tl.float32)
            for other in tl.range(0, num_used):
                there = base + other
                maximum = tl.load(
                    sums_ptr + there * 2 * ROWS + rows, mask=is_head, cache_modifier=".cg"
                )
                part = tl.load(
                    partial_ptr + there * ROWS * DIM + tile,
                    mask=is_head[:, None],
                    cache_modifier=".cg",
                )
                acc += part * tl.exp2(maximum - highest)[:, None]
    if HAS_SHARED:  # noqa: SIM102  # known at compile time
        if first > 0:
            num_seqs = tl.num_programs(0)
            num_heads = num_kv_heads * GROUP
            for other in tl.range(0, shared_splits):
                sums = shared_sums_ptr + (2 * other * num_seqs + seq) * num_heads + heads
                maximum = tl.load(sums, mask=rows < GROUP, other=0.0)
                part_total = tl.load(sums + num_seqs * num_heads, mask=rows < GROUP, other=0.0)
                part = tl.load(
                    shared_partial_ptr
                    + ((other * num_seqs + seq) * num_heads + heads)[:, None] * DIM
                    + dims[None, :],
                    mask=(rows < GROUP)[:, None],
                    other=0.0,
                )
                higher = tl.maximum(highest, maximum)
                shrink = tl.exp2(highest - higher)
                grow = tl.exp2(maximum - higher)
                acc = acc * shrink[:, None] + part * grow[:, None]
                total = total * shrink + part_total * grow
                highest = higher
    out = acc / total[:, None]
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


def plan_splits(num_seqs: int, num_kv_heads: int, max_len: int, num_processors: int) -> Splits:
    """How to cut contexts of at most max_len keys."""
    target: int = triton.cdiv(PROGRAMS_PER_PROCESSOR * num_processors, num_seqs * num_kv_heads)
    # Where all are short, there would not be as many programs as are wanted.
    shortest = max(max_len // target, MIN_SPLIT_LEN)
    min_len = min(SPLIT_LENS.get(target, MIN_SPLIT_LEN), shortest)
    few = min(FEW_SPLITS, MAX_PARTS // (num_seqs * num_kv_heads))
    most: int = triton.cdiv(max_len, min_len)
    return Splits(max(min(max(target, few), most, MOST_SPLITS), 1), min_len)


def choose_config(head_dim: int, itemsize: int, min_split: int) -> DecodeConfig:
    """By the bytes that one iteration keeps in shared memory; where there are few programs, each
    may take more of it. On an H100, head_dim 128, bfloat16, 8 KV heads: 16 sequences x 16,384 keys
    in 363 us (96 % of the read ceiling), 256 of 100 to 1,500 in 275 us (92 %), 32 of 900 on
    average, some far longer, in 48 us (67 %), 1 x 2,000 in 12 us.
    """
    row_bytes = triton.next_power_of_2(head_dim) * itemsize
    if row_bytes <= 256:
        return DecodeConfig(128, 4, 2) if min_split == MIN_SPLIT_LEN else DecodeConfig(64, 4, 3)
    return DecodeConfig(block_n=32, num_warps=4, num_stages=3 if row_bytes <= 512 else 2)


def paged_decode(
    query: torch.Tensor,  # [num_seqs, num_heads, head_dim] contiguous
    out: torch.Tensor,  # as query
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,  # [>= num_seqs, max_blocks] int32
    seq_lens: torch.Tensor,  # [>= num_seqs] int32; 0: there is none, nothing is written
    max_seq_len: int,  # a bound that only decides how finely contexts are cut
    workspace: DecodeWorkspace,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    config: DecodeConfig | None = None,
    shared: SharedPart | None = None,  # not with a window
) -> None:
    """Attend, into `out`. The keys of the query tokens themselves are in the cache already."""
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    if not num_seqs:
        return
    group = num_heads // num_kv_heads
    rows, dim = max(triton.next_power_of_2(group), 16), triton.next_power_of_2(head_dim)
    max_len = max_seq_len if window is None else min(max_seq_len, window)
    processors = launch.num_processors(query.device)
    num_splits, min_split = plan_splits(num_seqs, num_kv_heads, max_len, processors)
    config = config or choose_config(head_dim, k_cache.element_size(), min_split)
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
        *((seq_lens, query, query, 0) if shared is None else shared),
        block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        head_dim,
        min_split,
        window or 0,
        scale,
        softcap or 0.0,
        GROUP=group,
        ROWS=rows,
        DIM=dim,
        EVEN_DIM=dim == head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_N=config.block_n,
        SPLIT=num_splits > 1,
        MAX_SPLITS=MOST_SPLITS,
        HAS_SHARED=shared is not None,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        OVERLAP=overlap,
        **launch.options(overlap, config.num_warps, config.num_stages),
    )
